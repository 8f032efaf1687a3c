"""Scores of channels by group: their place among the original channels, and scales that make groups comparable."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.scores import not_rankable
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

__all__ = ["Scores", "divide_by_mean", "divide_by_norm", "flops_per_channel", "to_original_channels"]

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
