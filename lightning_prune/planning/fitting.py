"""From channels in one ranking to widths that fit a budget."""

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["Limits", "fit"]


def fit(
    graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, cost: CostModel, limits: "Limits"
) -> PruningPlan:
    """Keep as many of the best channels as the budget allows.

    Args:
        graph: The traced model.
        scores: (channels,) float64 score of each channel of every group, comparable between groups; ``-inf`` for
            channels that are gone, ``inf`` for groups that stay whole.
        keep: Fraction of the original cost that may stay.
        cost: What the network costs.
        limits: The widths that are allowed.

    Raises:
        ValueError: If the budget cannot be reached.
    """
    target = keep * cost.original
    least = limits.reachable(cost)
    limits.check(keep, cost.metric, least)
    ranked = _Ranked(scores, list(graph.groups))
    low, high = 0, len(ranked.group)  # how many of the best channels stay; `low` always fits
    while low < high:
        middle = (low + high + 1) // 2
        if cost.of(limits.rounded(ranked.widths(middle))) <= target:
            low = middle
        else:
            high = middle - 1
    widths = limits.rounded(ranked.widths(low))
    rounded = cost.of(widths)
    widths = _give_back(widths, limits, ranked, cost, target)
    kept = {
        name: scores[name].argsort(descending=True, stable=True)[: int(width)].sort().values
        for name, width in zip(graph.groups, widths, strict=True)
    }
    budget = {
        "metric": cost.metric,
        "asked": keep,
        "reachable": least,
        "rounded": rounded / cost.original,
        "achieved": cost.of(widths) / cost.original,
        "original": cost.original,
        "round_to": limits.round_to,
    }
    made = graph.plan(kept)
    return PruningPlan(made.groups, made.shapes, budget)


class Limits:
    """The widths that rounding, the least number of channels and the cap allow."""

    def __init__(
        self, graph: ChannelGraph, scores: Mapping[str, Tensor], round_to: int, min_channels: int, cap: float = 1.0
    ) -> None:
        for name, value in (("round_to", round_to), ("min_channels", min_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        if not 0 < cap <= 1:
            raise ValueError(f"cap must be the greatest fraction that a group may lose, in (0, 1]; got {cap!r}.")
        self.round_to, self.min_channels, self.cap = round_to, min_channels, cap
        groups = list(graph.groups.values())
        self.most = np.array([int((scores[g.name] > -math.inf).sum()) for g in groups], dtype=np.int64)
        whole = np.array([bool((scores[g.name] == math.inf).any()) for g in groups], dtype=bool)
        self.step = np.array([round_to // math.gcd(round_to, g.width) for g in groups], dtype=np.int64)
        # The small number keeps 0.99 of 100 at 99, where the product may fall short of it.
        capped = np.array([g.size - math.floor(cap * g.size + 1e-9) for g in groups], dtype=np.int64)
        asked = np.array([max(min_channels, g.least) for g in groups], dtype=np.int64)
        least = -(-np.maximum(asked, capped) // self.step) * self.step
        self.least = np.where(whole, self.most, np.minimum(np.maximum(least, self.step), self.most))

    def reachable(self, cost: CostModel) -> float:
        """Return the least fraction of the original cost that can stay."""
        return cost.of(self.least) / cost.original

    def check(self, keep: float, metric: str, least: float) -> None:
        """Raise a ValueError unless the budget is at least the fraction that has to stay."""
        if least <= keep:
            return
        capped = f", and at most {self.cap} of a layer may go" if self.cap < 1 else ""
        raise ValueError(
            f"keep={keep} of the {metric} cannot be reached: between {least:.3f} and 1 can stay with "
            f"round_to={self.round_to} and min_channels={self.min_channels}{capped}. Raise keep, or "
            "lower round_to."
        )

    def rounded(self, widths: np.ndarray) -> np.ndarray:
        """Round widths down to what is allowed; a group that loses nothing stays as it is."""
        down = np.maximum(widths // self.step * self.step, self.least)
        return np.where(widths >= self.most, self.most, down)

    def above(self, width: int, group: int) -> int:
        """Return the next allowed width of a group."""
        return int(min(width + self.step[group], self.most[group]))


class _Ranked:
    """All channels, best first; equal scores in the order of groups and channels, the same on every machine."""

    def __init__(self, scores: Mapping[str, Tensor], names: list[str]) -> None:
        values = [scores[name].numpy() for name in names]
        group = np.repeat(np.arange(len(names)), [len(v) for v in values])
        flat = np.concatenate(values) if values else np.zeros(0)
        order = np.argsort(-flat, kind="stable")
        order = order[flat[order] > -math.inf]
        self.group = group[order]
        self.count = len(names)
        self.descending = [np.sort(v)[::-1] for v in values]

    def widths(self, best: int) -> np.ndarray:
        """Return how many channels of each group are among the best."""
        return np.bincount(self.group[:best], minlength=self.count)


def _give_back(widths: np.ndarray, limits: Limits, ranked: _Ranked, cost: CostModel, target: float) -> np.ndarray:
    """Widen groups, one rounding step at a time, while the budget allows; best next channels first."""
    widths = widths.copy()
    open_groups = {i for i in range(len(widths)) if widths[i] < limits.most[i]}
    while open_groups:
        group = max(open_groups, key=lambda i: (ranked.descending[i][widths[i]], -i))
        wider = widths.copy()
        wider[group] = limits.above(widths[group], group)
        if cost.of(wider) <= target:
            widths = wider
        if cost.of(wider) > target or widths[group] >= limits.most[group]:
            open_groups.remove(group)
    return widths
