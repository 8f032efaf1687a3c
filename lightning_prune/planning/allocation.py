"""From scores and a budget to a plan: how much each group gives, and which channels go."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.by_time import measured_fraction, plan_for_latency, timed_plan, with_best_rounding
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.fitting import Limits, fit
from lightning_prune.planning.profiling import profile
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["check_keep", "check_reachable", "checked_scores", "plan", "plan_by_layer", "reachable"]


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int | str = 8,
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
        metric: What the fraction is of: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"``, which is timed on
            the device where the model is; see `lightning_prune.planning.by_time`.
        round_to: Layers that lose channels keep a multiple of this many; 1 for no rounding; for latency also
            ``"auto"``, the multiple that keeps most on this device.
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
    known = checked_scores(graph, scores)
    if metric == "latency":
        return plan_for_latency(graph, known, keep, round_to, min_channels)
    limits = Limits(graph, known, round_to, min_channels)  # type: ignore[arg-type]  # "auto" is refused there
    return fit(graph, known, keep, CostModel(graph, metric), limits)


def plan_by_layer(
    graph: ChannelGraph,
    importance: Mapping[str, float],
    scores: Mapping[str, Tensor],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int | str = 8,
    min_channels: int = 1,
    cap: float = 0.99,
) -> PruningPlan:
    """Give each group a share of the cut by one number, and choose the channels within it by their scores.

    A group loses the fraction ``min(cap, t / importance)`` of its channels, with the same ``t`` for all, found by
    bisection so that what stays, in whole channels, fits the budget. Equal importances are the uniform allocation. What
    rounding leaves of the budget goes back, step by step, to the groups that have lost most beyond their share.

    Args:
        graph: The traced model.
        importance: One number above 0 per group, larger for groups that lose less. Groups that are absent stay whole.
        scores: (channels,) score of each channel of each group, compared within the group only, higher is kept;
            ``-inf`` for channels that the model no longer has. Groups that are absent stay whole.
        keep: Fraction of the original cost that may stay, in (0, 1].
        metric: As for `plan`.
        round_to: As for `plan`.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].

    Returns:
        The plan, with the same ``budget`` as that of `plan`.

    Raises:
        ValueError: If a setting is out of range, an importance is not a finite number above 0, the budget cannot be
            reached, or scores do not fit the groups.

    Note:
        The rule that a layer loses the inverse of its importance, and the cap of 0.99, are those of Lu et al.,
        "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI 2024), whose budget counts filters
        (``metric="channels"``). Solving the budget under the caps is a choice made here.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import criteria, trace
        >>> layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 10)]
        >>> graph = trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
        >>> made = plan_by_layer(
        ...     graph, {"0": 1.0, "2": 2.0}, criteria.magnitude(graph), keep=0.625, metric="channels", round_to=1
        ... )
        >>> made.widths  # of 64 channels half are lost by the one, a quarter by the other
        {'0': 32, '2': 48}
    """
    check_keep(keep)
    known = checked_scores(graph, scores)
    for name, value in importance.items():
        graph.group(name)
        if not 0 < value < math.inf:
            raise ValueError(f"The importance of group {name!r} must be a finite number above 0; got {value!r}.")
    shares = {name: _share_of_each(known[name], importance.get(name, math.inf)) for name in graph.groups}
    cost = _cost(graph, metric)

    def make(step: int) -> PruningPlan:
        limits = Limits(graph, shares, step, min_channels, cap)
        if metric == "latency":
            return timed_plan(graph, keep, limits, lambda aimed: fit(graph, shares, aimed, cost, limits))
        return fit(graph, shares, keep, cost, limits)

    return with_best_rounding(round_to, known, make) if metric == "latency" else make(round_to)  # type: ignore[arg-type]


def _share_of_each(scores: Tensor, importance: float) -> Tensor:
    """Return the ``t`` at which each channel leaves; the channel that scores lowest leaves first.

    Of n channels the one at rank r, from 0 for the best, leaves when the width asked for falls below r + 1/2, that is
    beyond ``t = importance * (n - r - 1/2) / n``. Ranking all channels by these numbers is searching for ``t``.
    """
    order = scores.argsort(descending=True, stable=True)
    left = torch.arange(len(scores), 0, -1, dtype=torch.float64).sub(0.5) / len(scores)
    leaves = torch.empty_like(scores)
    leaves[order] = left * importance if importance < math.inf else math.inf
    leaves[scores == math.inf] = math.inf
    leaves[scores == -math.inf] = -math.inf
    return leaves


def reachable(
    graph: ChannelGraph, metric: str, round_to: int | str = 8, min_channels: int = 1, cap: float = 1.0
) -> float:
    """Return the least fraction of the original cost that can stay.

    Args:
        graph: The traced model.
        metric: ``"flops"``, ``"params"`` or ``"channels"``.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].
    """
    return _limits_of_all(graph, round_to, min_channels, cap).reachable(_cost(graph, metric))


def check_reachable(
    graph: ChannelGraph, keep: float, metric: str, round_to: int | str = 8, min_channels: int = 1, cap: float = 1.0
) -> None:
    """Raise a ValueError, with the range that can be reached, if a budget cannot.

    Where the profile of the network says that a budget of time cannot be reached, the smallest network is timed.

    Args:
        graph: The traced model.
        keep: Fraction of the original cost that may stay.
        metric: ``"flops"``, ``"params"``, ``"channels"`` or ``"latency"``.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].
    """
    limits = _limits_of_all(graph, round_to, min_channels, cap)
    least = limits.reachable(_cost(graph, metric))
    if metric == "latency" and least > keep:
        least = measured_fraction(graph, dict(zip(graph.groups, limits.least.tolist(), strict=True)))
    limits.check(keep, metric, least)


def _cost(graph: ChannelGraph, metric: str) -> CostModel:
    if metric == "latency" and metric not in graph.terms:
        profile(graph)
    return CostModel(graph, metric)


def check_keep(keep: float) -> None:
    """Raise a ValueError unless the fraction is in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep must be the fraction that stays, above 0 and at most 1; got {keep!r}.")


def checked_scores(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of every group as float64 on the CPU; groups without scores stay whole.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of some groups.

    Raises:
        ValueError: If scores do not fit the groups, or are no numbers that can be ranked.
    """
    known = {}
    for name in scores:
        graph.group(name)
    for name, group in graph.groups.items():
        given = scores.get(name)
        if given is None:
            known[name] = torch.full((group.size,), -math.inf, dtype=torch.float64)
            known[name][graph.kept(name)] = math.inf
            continue
        if given.shape != (group.size,):
            raise ValueError(
                f"Group {name!r} has {group.size} channels, but its scores have shape {tuple(given.shape)}."
            )
        if bool(given.isnan().any()):
            raise ValueError(f"The scores of group {name!r} contain NaN; look for non-finite weights or gradients.")
        known[name] = given.detach().to("cpu", torch.float64)
    return known


def _limits_of_all(graph: ChannelGraph, round_to: int | str, min_channels: int, cap: float) -> Limits:
    scores = {name: torch.zeros(group.size) for name, group in graph.groups.items()}
    return Limits(graph, scores, 1 if round_to == "auto" else int(round_to), min_channels, cap)
