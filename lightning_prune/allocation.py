"""From scores and a budget to a plan: how much each group gives, and which channels go."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_prune.budget import CostModel
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.plan import PruningPlan

__all__ = ["check_keep", "plan", "reachable"]


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int = 8,
    min_channels: int = 1,
) -> PruningPlan:
    """Choose the channels that stay: the best of all groups together that fit the budget.

    Channels of all groups are ranked in one list. The lowest leave until the rest, rounded, fits the budget; what is
    then left of the budget is given back step by step to the groups whose next channels score highest.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of each group, higher is kept; ``-inf`` for channels that the model
            no longer has. Scores of different groups must be comparable. Groups that are absent stay whole.
        keep: Fraction of the original cost that may stay, in (0, 1].
        metric: What the fraction is of: ``"flops"``, ``"params"`` or ``"channels"``.
        round_to: Layers that lose channels keep a multiple of this many; 1 for no rounding.
        min_channels: Least number of channels of a group.

    Returns:
        The plan. Its ``budget`` tells what was asked, what could be reached, and what was achieved, as fractions.

    Raises:
        ValueError: If a setting is out of range, the budget cannot be reached, or scores do not fit the groups.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import criteria, trace
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = model(torch.zeros(1, 3, 8, 8))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> made = plan(graph, criteria.magnitude(graph), keep=0.5, round_to=8)
        >>> made.budget["achieved"] <= 0.5
        True
    """
    check_keep(keep)
    known = _scores(graph, scores)
    limits = _Limits(graph, known, round_to, min_channels)
    cost = CostModel(graph, metric)
    target = keep * cost.original
    least = cost.of(limits.least)
    if least > target:
        raise ValueError(
            f"keep={keep} of the {metric} cannot be reached: with round_to={round_to}, min_channels={min_channels} and "
            f"what is held, between {least / cost.original:.3f} and 1 can stay. Raise keep, or lower round_to."
        )
    ranked = _Ranked(known, list(graph.groups))
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
        name: known[name].argsort(descending=True, stable=True)[: int(width)].sort().values
        for name, width in zip(graph.groups, widths, strict=True)
    }
    budget = {
        "metric": metric,
        "asked": keep,
        "reachable": least / cost.original,
        "rounded": rounded / cost.original,
        "achieved": cost.of(widths) / cost.original,
        "original": cost.original,
        "round_to": round_to,
    }
    made = graph.plan(kept)
    return PruningPlan(made.groups, made.shapes, budget)


def reachable(graph: ChannelGraph, metric: str, round_to: int = 8, min_channels: int = 1) -> float:
    """Return the least fraction of the original cost that can stay.

    Args:
        graph: The traced model.
        metric: ``"flops"``, ``"params"`` or ``"channels"``.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
    """
    cost = CostModel(graph, metric)
    whole = {name: torch.zeros(group.size) for name, group in graph.groups.items()}
    return cost.of(_Limits(graph, whole, round_to, min_channels).least) / cost.original


def check_keep(keep: float) -> None:
    """Raise a ValueError unless the fraction is in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep must be the fraction that stays, above 0 and at most 1; got {keep!r}.")


def _scores(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of every group on the CPU; groups without scores stay whole."""
    known = {}
    for name in scores:
        graph.group(name)
    for name, group in graph.groups.items():
        given = scores.get(name)
        if given is None:
            known[name] = torch.full((group.size,), -math.inf, dtype=torch.float64)
            known[name][graph.live(name)] = math.inf
            continue
        if given.shape != (group.size,):
            raise ValueError(
                f"Group {name!r} has {group.size} channels, but its scores have shape {tuple(given.shape)}."
            )
        if bool(given.isnan().any()):
            raise ValueError(f"The scores of group {name!r} contain NaN; look for non-finite weights or gradients.")
        known[name] = given.detach().to("cpu", torch.float64)
    return known


class _Limits:
    """The widths that rounding and the least number of channels allow."""

    def __init__(self, graph: ChannelGraph, scores: Mapping[str, Tensor], round_to: int, min_channels: int) -> None:
        for name, value in (("round_to", round_to), ("min_channels", min_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        groups = list(graph.groups.values())
        self.most = np.array([int((scores[g.name] > -math.inf).sum()) for g in groups], dtype=np.int64)
        whole = np.array([bool((scores[g.name] == math.inf).any()) for g in groups], dtype=bool)
        self.step = np.array([round_to // math.gcd(round_to, g.width) for g in groups], dtype=np.int64)
        least = -(-min_channels // self.step) * self.step
        self.least = np.where(whole, self.most, np.minimum(np.maximum(least, self.step), self.most))

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


def _give_back(widths: np.ndarray, limits: _Limits, ranked: _Ranked, cost: CostModel, target: float) -> np.ndarray:
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
