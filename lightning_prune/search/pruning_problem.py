"""Pruning as a problem of decisions: what is decided, within which bounds, and which plan comes of it."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune import criteria, planning
from lightning_prune.candidates import Memory, evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.channel_graph import Group
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.scores import checked_scores
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search.width_bounds import WidthBounds

__all__ = ["OBSERVATION_SIZE", "Measure", "PruningProblem", "accuracy_of"]

OBSERVATION_SIZE = 9
_ROUNDING = 1e-9

Measure = Callable[[Sequence[PruningPlan]], Tensor]
"""Given plans, returns the (plans,) reward of each."""


def accuracy_of(graph: ChannelGraph, batches: Iterable[Any], **settings: Any) -> Measure:
    """Return what rewards plans by the accuracy that the model has once they are applied, all in one evaluation.

    Args:
        graph: The traced model.
        batches: The batches to measure on.
        settings: As for `evaluate_candidates`: ``compensate``, and the ``compensate_batches`` for it. What is collected
            for that is kept for as long as the weights are the same.
    """
    kept = {"memory": Memory(), **settings}
    return lambda plans: evaluate_candidates(graph, plans, batches, **kept).accuracy


class PruningProblem:
    """Say what agents decide on and what they see; plans are made of what they decide.

    Each step decides on one group, in the order of the forward pass. The action is the fraction of its original
    channels that is pruned; which channels are pruned is up to a criterion.

    Args:
        graph: The traced model, pruned already or not.
        keep: Fraction of the original cost that may be kept.
        metric: What the fraction is of: ``"flops"``, ``"params"`` or ``"channels"``.
        criterion: What scores the channels within a group; one that needs no data.
        round_to: Layers that are pruned keep a multiple of this many channels.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that may be pruned of a group.
        scores: (channels,) score of each channel, by group name, in place of a criterion.

    Raises:
        ValueError: If the budget cannot be reached, or a setting is out of range.

    Note:
        The nine numbers that an agent sees of a group follow Ganjdanesh et al., "Jointly Training and Pruning CNNs via
        Learnable Agent Guidance and Alignment" (CVPR 2024), as a reproduction has them: position, channels read,
        channels, stride, kernel size, cost of the group, cost spent so far, cost that is still open, and the last
        action. Interpretation: a group stands for a layer, each of the first five is scaled by its greatest value in
        the network, and costs are fractions of the original, in which groups that share layers count as they are.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> from lightning_prune.search.episodes import PruningEpisodes
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> problem = PruningProblem(trace(model, torch.zeros(1, 1)), keep=0.5, metric="params")
        >>> episodes = PruningEpisodes(problem, n=1)
        >>> while not episodes.ended:
        ...     episodes.step(torch.full((1, 1), 0.5))
        >>> problem.plan(episodes.widths[0]).widths
        {'0': 4, '1': 7}
    """

    def __init__(
        self,
        graph: ChannelGraph,
        *,
        keep: float = 0.5,
        metric: str = "flops",
        criterion: str | Mapping[str, Any] = "l1",
        round_to: int = 1,
        min_channels: int = 1,
        cap: float = 0.8,
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        if scores is None:
            scores = criteria.score(graph, criterion)
        self.graph = graph
        self.cost = CostModel(graph, metric)
        self.bounds = WidthBounds(graph, self.cost, keep, round_to, min_channels, cap)
        self.sizes = self.cost.sizes  # (groups,) original channels
        self.scores = checked_scores(graph, scores)
        self.features = _features(graph, self.cost)

    def __len__(self) -> int:
        """Return the number of steps of an episode."""
        return len(self.sizes)

    def allocation(self) -> np.ndarray:
        """Return what the scores of all channels, ranked together, leave to each group: (groups,) int64."""
        bounds = self.bounds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a budget that widths cannot meet closely
            plan = planning.plan(self.graph, self.scores, bounds.keep, self.cost.metric, bounds.round_to)
        widths = [plan.widths.get(name, size) for name, size in zip(self.graph.groups, self.sizes, strict=True)]
        return np.clip(widths, bounds.least, bounds.most)

    def within_budget(self, widths: np.ndarray) -> np.ndarray:
        """Tell which widths are within the budget: (n,) bool.

        Args:
            widths: (n, groups) channels that are kept.
        """
        costs = self.cost.of_terms(widths).sum(axis=1)
        return costs <= self.bounds.budget * (1 + _ROUNDING)

    def plan(self, widths: Sequence[int] | np.ndarray) -> PruningPlan:
        """Keep the best channels of each group.

        Args:
            widths: (groups,) channels that are kept.
        """
        kept = {}
        for name, width in zip(self.graph.groups, widths, strict=True):
            best_first = self.scores[name].argsort(descending=True, stable=True)
            kept[name] = best_first[: int(width)]
        plan = self.graph.plan(kept)
        return PruningPlan(plan.groups, plan.shapes, self.bounds.report(np.asarray(widths)))


def _features(graph: ChannelGraph, cost: CostModel) -> Tensor:
    """Return what an episode does not change of each group, and of the end: (groups + 1, 6), each from 0 to 1."""
    rows = []
    for position, group in enumerate(graph.groups.values()):
        layer = _first_layer(graph, group)
        share_of_cost = _share_of_cost(cost, position)
        rows.append([position, layer.in_channels, group.size, layer.stride, layer.kernel_size, share_of_cost])
    end = [len(rows), 0, 0, 0, 0, 0]
    features = torch.tensor([*rows, end], dtype=torch.float32)
    features[:, :5] /= features[:, :5].amax(0)
    return features


@dataclass(frozen=True)
class _Layer:
    """What an agent sees of a layer; 1 stands for what the layer has not."""

    in_channels: int
    stride: int
    kernel_size: int


def _first_layer(graph: ChannelGraph, group: Group) -> _Layer:
    """Return what is seen of the layer that makes the channels of a group first."""
    out_slice = group.out_slices[0]
    shape = graph.shapes[out_slice.tensor]
    in_channels = shape[1 - out_slice.axis] if len(shape) > 1 else 1
    kernel_size = shape[-1] if len(shape) > 2 else 1
    module_name, _, _ = out_slice.tensor.rpartition(".")
    modules = dict(graph.model.named_modules())
    stride = getattr(modules.get(module_name), "stride", 1)
    if isinstance(stride, tuple):
        stride = stride[-1]
    return _Layer(in_channels, stride, kernel_size)


def _share_of_cost(cost: CostModel, group: int) -> float:
    """Return the fraction of the original cost that the network would not have without a group."""
    without_group = cost.sizes.copy()
    without_group[group] = 0
    return 1 - cost.fraction(without_group)
