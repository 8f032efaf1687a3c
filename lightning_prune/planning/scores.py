"""Scores of channels as planning takes them: of every group, on the CPU, without NaN."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.graph.finite import REMEDY, cause_in

__all__ = ["best_channels", "checked_scores", "not_rankable", "shares_pruned"]


def checked_scores(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of every group as float64 on the CPU; groups without scores keep all channels.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of some groups.

    Returns:
        (channels,) score of each channel of every group: ``inf`` where none were given, ``-inf`` for channels that are
        pruned.

    Raises:
        ValueError: If scores do not fit the groups, or are no numbers that can be ranked.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), torch.zeros(1, 2))
        >>> checked_scores(graph, {})
        {'0': tensor([inf, inf], dtype=torch.float64)}
    """
    for name in scores:
        graph.group(name)
    now = graph.snapshot({})
    checked = {}
    for name, group in graph.groups.items():
        given = scores.get(name)
        kept = now.kept(name)
        checked[name] = _keeping_all(group, kept) if given is None else _checked(graph.model, group, kept, given)
    return checked


def best_channels(scores: Tensor, width: int) -> Tensor:
    """Return the channels of a group that score highest, of equal ones the first: (width,) int64.

    Args:
        scores: (channels,) score of each channel.
        width: Number of channels to keep.

    Example:
        >>> best_channels(torch.tensor([0.1, 0.3, 0.2, 0.3]), 2)
        tensor([1, 3])
    """
    return scores.argsort(descending=True, stable=True)[:width]


def shares_pruned(scores: Tensor) -> Tensor:
    """Return what share of some channels is pruned when each of them is, the lowest first: (channels,) float64.

    Of n channels the one at place r, from 0 for the best, is pruned when fewer than r + 1/2 are kept, so that its share
    is (n - r - 1/2) / n. Of equal channels the last is pruned first.

    Args:
        scores: (channels,) score of each channel.

    Example:
        >>> shares_pruned(torch.tensor([0.1, 0.3, 0.2, 0.3]))
        tensor([0.1250, 0.8750, 0.3750, 0.6250], dtype=torch.float64)
    """
    size = len(scores)
    best_first = scores.argsort(descending=True, stable=True)
    shares = torch.empty(size, dtype=torch.float64)
    shares[best_first] = torch.arange(size, 0, -1, dtype=torch.float64).sub(0.5) / size
    return shares


def not_rankable(model: nn.Module, group: str) -> ValueError:
    """Return what to raise where scores of a group are not finite; it names the parameter that is the reason.

    Args:
        model: The model that was scored.
        group: The group.
    """
    cause = cause_in(model)
    reason = f"as {cause}" if cause else "though all parameters are: the criterion overflows, or divides by nothing"
    return ValueError(f"The scores of group {group!r} are not finite, {reason}; {REMEDY}.")


def _checked(model: nn.Module, group: Group, kept: Tensor, scores: Tensor) -> Tensor:
    if scores.shape != (group.size,):
        shape = tuple(scores.shape)
        raise ValueError(f"Group {group.name!r} has {group.size} channels, but its scores have shape {shape}.")
    has_infinite = bool(scores[kept.to(scores.device)].isinf().any())  # which may be meant: keep it, whatever it costs
    if bool(scores.isnan().any()) or (has_infinite and cause_in(model)):
        raise not_rankable(model, group.name)
    return scores.detach().to("cpu", torch.float64)


def _keeping_all(group: Group, kept: Tensor) -> Tensor:
    """Return scores that keep all channels that the model still has."""
    scores = torch.full((group.size,), -math.inf, dtype=torch.float64)
    scores[kept] = math.inf
    return scores
