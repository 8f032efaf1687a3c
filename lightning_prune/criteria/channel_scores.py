"""Scores of channels by group: their place among the original channels, and scales that make groups comparable."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.scores import not_rankable
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

__all__ = [
    "Scores",
    "divide_by_mean",
    "divide_by_norm",
    "flops_per_channel",
    "refuse_blocks",
    "to_original_channels",
    "with_blocks",
]

Scores = dict[str, Tensor]
"""The score of each channel, by group; higher is kept."""


def to_original_channels(graph: ChannelGraph, scores_of_kept: Mapping[str, Tensor]) -> Scores:
    """Give scores of the channels that the model has now their place among the original ones.

    Args:
        graph: The traced model.
        scores_of_kept: (kept channels,) score of each channel, by group.

    Returns:
        (channels,) score of each group, on the CPU; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If a score is not finite, but for ``inf`` of the only channel of a group, which cannot be pruned.
    """
    scores = {}
    now = graph.snapshot({})
    for name, values in scores_of_kept.items():
        size = graph.groups[name].size
        kept = now.kept(name)
        is_finite = bool(values.isfinite().all())
        is_nan = bool(values.isnan().any())
        if is_nan or (not is_finite and len(values) > 1):
            raise not_rankable(graph.model, name)
        original = torch.full((size,), -math.inf)
        original = original.to(values.dtype)
        original[kept] = values.detach().cpu()
        scores[name] = original
    return scores


def with_blocks(graph: ChannelGraph, scores: Scores) -> Scores:
    """Add the scores of the residual blocks of a graph: the mean over the channels that are pruned with each.

    Plans compare scores whatever is pruned with a channel, so that a block, which is pruned when all of its channels
    are, is worth as much as these are on average.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of other groups; ``-inf`` for channels that have been pruned.

    Returns:
        The scores, with (1,) of each block: ``-inf`` for one that has been pruned. A block without channels of its own
        gets none, so that it is kept.
    """
    inside: dict[str, list[Tensor]] = {block: [] for block in graph.blocks}
    for name, values in scores.items():
        blocks = {graph.block_of(module) for module in graph.groups[name].modules}
        block = min(blocks)
        if block and len(blocks) == 1 and name not in inside:
            inside[block].append(values[values.isfinite()])
    now = graph.snapshot({})
    added = dict(scores)
    for block, of_channels in inside.items():
        joined = torch.cat([*of_channels, torch.zeros(0)])
        if not len(now.kept(block)):
            added[block] = torch.tensor([-math.inf])
        elif len(joined):
            added[block] = joined.mean().reshape(1)
    return added


def refuse_blocks(criterion: str) -> None:
    """Raise a ValueError that a criterion tells nothing of residual blocks.

    Args:
        criterion: The criterion, in words.
    """
    raise ValueError(
        f"{criterion} compares channels with others of their group, which tells nothing of blocks; leave blocks out, "
        "or use coherent_obs, batch_norm_scale, oracle, or taylor with normalize=False."
    )


def divide_by_norm(scores: Mapping[str, Tensor]) -> Scores:
    """Divide the scores of each group by their Euclidean norm."""
    return {name: _divide(values, values.norm()) for name, values in scores.items()}


def divide_by_mean(scores: Mapping[str, Tensor]) -> Scores:
    """Divide the scores of each group by their mean."""
    return {name: _divide(values, values.mean()) for name, values in scores.items()}


def flops_per_channel(graph: ChannelGraph) -> dict[str, float]:
    """Return what one channel less in each group would save now, as fractions of their sum."""
    cost = CostModel(graph, "flops")
    plan = plan_in_force(graph.model) or PruningPlan()
    widths = plan.widths
    now = cost(widths)
    saved = {}
    snapshot = graph.snapshot({})
    for name in graph.groups:
        kept = snapshot.kept(name)
        one_less = {name: len(kept) - 1}
        smaller = cost({**widths, **one_less})
        saved[name] = now - smaller
    total = sum(saved.values())
    total = max(total, 1)
    return {name: flops / total for name, flops in saved.items()}


def _divide(values: Tensor, divisor: Tensor) -> Tensor:
    smallest = torch.finfo(values.dtype).tiny
    return values / divisor.clamp_min(smallest)
