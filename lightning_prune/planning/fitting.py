"""Widths that fit a budget, from one ranking of the channels of all groups."""

import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.budget import Budget
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.scores import best_channels
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["fit"]

_NEARLY_ALL = 0.95  # of the budget: more than what is left then is worth a word


def fit(graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, cost: CostModel, limits: Limits) -> PruningPlan:
    """Keep as many of the best channels as the budget allows.

    Args:
        graph: The traced model.
        scores: (channels,) float64 score of each channel of every group, comparable between groups; ``-inf`` for
            channels that are pruned already, ``inf`` for those of groups that keep all channels.
        keep: Fraction of the original cost that may be kept.
        cost: What the network costs.
        limits: The widths that are allowed.

    Raises:
        ValueError: If the budget cannot be reached.
    """
    reachable = limits.reachable(cost)
    limits.check(keep, cost.metric, reachable)
    affordable = keep * cost.original
    ranking = _Ranking([scores[name] for name in graph.groups])
    rounded = _widths_of_best(ranking, limits, cost, affordable)
    widths = _widened(rounded, ranking, limits, cost, affordable)
    _tell_if_nothing_more(widths, limits, cost, keep)
    _tell_if_coarse(graph, widths, limits, cost, keep)
    budget = Budget(
        metric=cost.metric,
        asked=keep,
        reachable=reachable,
        rounded=cost.fraction(rounded),
        achieved=cost.fraction(widths),
        original=cost.original,
        round_to=limits.round_to,
    )
    width_of = zip(graph.groups, widths.tolist(), strict=True)
    plan = graph.plan({name: best_channels(scores[name], width) for name, width in width_of})
    return replace(plan, budget=budget.to_json())


def _tell_if_nothing_more(widths: np.ndarray, limits: Limits, cost: CostModel, keep: float) -> None:
    """Warn if a network that has been pruned before is within the budget already."""
    is_pruned = (limits.most < cost.sizes).any()
    if is_pruned and keep < 1 and (widths == limits.most).all():
        warnings.warn(
            f"keep={keep} prunes nothing: fractions are of the original network, of whose {cost.metric} "
            f"{cost.fraction(widths):.3f} is left since it was pruned before; lower keep.",
            stacklevel=2,
        )


def _tell_if_coarse(graph: ChannelGraph, widths: np.ndarray, limits: Limits, cost: CostModel, keep: float) -> None:
    """Warn if much of the budget is left since a step of rounding is too coarse, and name the group."""
    achieved = cost.fraction(widths)
    is_predicted = cost.metric == "latency"  # and measured afterwards
    if is_predicted or limits.round_to == 1 or achieved >= _NEARLY_ALL * keep:
        return
    steps = {}
    is_narrower = widths < limits.most
    for group in np.flatnonzero(is_narrower).tolist():
        wider = widths.copy()
        wider[group] = limits.above(widths[group], group)
        steps[group] = cost.fraction(wider) - achieved
    if not steps:  # nothing could be wider
        return
    coarsest = max(steps, key=lambda group: steps[group])
    step = steps[coarsest]
    names = list(graph.groups)
    name = names[coarsest]
    warnings.warn(
        f"{achieved:.3f} of the {cost.metric} is kept where keep={keep:.3f} was asked for: one step of "
        f"round_to={limits.round_to} in {name!r} is {step:.3f} of the cost; lower round_to.",
        stacklevel=2,
    )


class _Ranking:
    """All channels, best first; equal scores in the order of groups and channels, the same on every machine.

    Args:
        scores: (channels,) score of each channel, for each group.
    """

    def __init__(self, scores: Sequence[Tensor]) -> None:
        by_group = [values.numpy() for values in scores]
        sizes = [len(values) for values in by_group]
        group_of_channel = np.repeat(np.arange(len(sizes)), sizes)
        all_scores = np.concatenate([*by_group, np.zeros(0)])
        best_first = np.argsort(-all_scores, kind="stable")
        still_there = all_scores[best_first] > -math.inf
        self._groups = group_of_channel[best_first[still_there]]  # the group of each channel, best channel first
        self._descending = [np.sort(values)[::-1] for values in by_group]

    def __len__(self) -> int:
        return len(self._groups)

    def widths(self, best: int) -> np.ndarray:
        """Return how many channels of each group are among the best: (groups,)."""
        return np.bincount(self._groups[:best], minlength=len(self._descending))

    def next_score(self, group: int, width: int) -> float:
        """Return the score of the best channel of a group that is not kept at some width."""
        return float(self._descending[group][width])


def _widths_of_best(ranking: _Ranking, limits: Limits, cost: CostModel, affordable: float) -> np.ndarray:
    """Return the widths, rounded, of the greatest number of best channels that can be afforded."""

    def cost_of_best(number: int) -> float:
        return cost.of(limits.rounded(ranking.widths(number)))

    numbers = range(1, len(ranking) + 1)
    most = bisect_right(numbers, affordable, key=cost_of_best)  # 0 if only the least widths can be afforded
    return limits.rounded(ranking.widths(most))


def _widened(widths: np.ndarray, ranking: _Ranking, limits: Limits, cost: CostModel, affordable: float) -> np.ndarray:
    """Widen groups, one rounding step at a time, while the budget allows; best next channels first."""

    def turn(group: int, width: int) -> tuple[float, int]:
        return -ranking.next_score(group, width), group

    open_groups = np.flatnonzero(widths < limits.most).tolist()
    turns = [turn(group, widths[group]) for group in open_groups]
    heapify(turns)
    while turns:
        _, group = heappop(turns)
        wider = widths.copy()
        wider[group] = limits.above(widths[group], group)
        if cost.of(wider) > affordable:
            continue
        widths = wider
        if widths[group] < limits.most[group]:
            heappush(turns, turn(group, widths[group]))
    return widths
