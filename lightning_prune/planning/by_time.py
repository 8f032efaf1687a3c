"""Plans within a budget of measured time: networks of predicted widths are timed until one fits."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.fitting import fit
from lightning_prune.planning.in_turns import forward_times
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.spread import ratios
from lightning_prune.pruning_plan import PruningPlan

__all__ = [
    "ROUNDINGS",
    "Planner",
    "best_plan",
    "by_score_per_cost",
    "kept_score",
    "measured_fraction",
    "timed_plan",
]

ROUNDINGS = (32, 16, 8, 4, 1)
"""What ``round_to="auto"`` tries, coarsest first: if not even single channels will do, nothing does."""

Planner = Callable[[ChannelGraph, Mapping[str, Tensor], float, CostModel, Limits], PruningPlan]
"""Given graph, ranking of the channels, fraction of the cost, cost and limits, returns a plan; as `fit` does."""

_CLOSE = 0.97  # of the budget: near enough to stop
_ATTEMPTS = 8
_CAUTION = 0.99  # a network that was too slow is not aimed at by the last percent again
_ROUNDS = 4  # after which the widths that a ranking is made for, and those that come of it, hardly differ


@dataclass(frozen=True)
class _Attempt:
    """A plan, and the fraction of the original time that its network took."""

    plan: PruningPlan
    fraction: float


def timed_plan(
    planner: Planner,
    graph: ChannelGraph,
    ranking: Mapping[str, Tensor],
    keep: float,
    cost: CostModel,
    limits: Limits,
) -> PruningPlan:
    """Aim at budgets of predicted time until the measured time fits.

    Each plan is timed against the original network, turn and turn about, and the next one aims at as much less, or
    more, as the last one was off.

    Args:
        planner: Makes a plan for a fraction of the predicted time.
        graph: The traced model.
        ranking: (channels,) float64 of every group; channels with the highest numbers are kept.
        keep: Fraction of the original time that may be taken.
        cost: The predicted time.
        limits: The widths that are allowed.

    Returns:
        The slowest plan that fits. Its ``budget`` tells the measured fraction as ``achieved`` and what the profile
        predicted as ``predicted``.

    Raises:
        ValueError: If no plan that was tried is fast enough, with what was measured.
    """
    attempts = _attempts(
        graph, keep, limits.reachable(cost), lambda aimed: planner(graph, ranking, aimed, cost, limits)
    )
    within_budget = [attempt for attempt in attempts if attempt.fraction <= keep]
    if not within_budget:
        fastest = min(attempt.fraction for attempt in attempts)
        raise ValueError(
            f"keep={keep} of the latency cannot be reached: the fastest network within round_to={limits.round_to} and "
            f"min_channels={limits.min_channels} that was timed took {fastest:.3f} of the original time. Raise keep, "
            "or lower round_to."
        )
    slowest = max(within_budget, key=lambda attempt: attempt.fraction)
    plan = slowest.plan
    predicted = cost(plan.widths) / cost.original
    measured = {"asked": keep, "achieved": slowest.fraction, "predicted": predicted}
    return replace(plan, budget={**(plan.budget or {}), **measured})


def _attempts(
    graph: ChannelGraph, keep: float, least: float, planned: Callable[[float], PruningPlan]
) -> list[_Attempt]:
    """Time plans until one is close to the budget, or there is no other to try."""
    attempts: list[_Attempt] = []
    aimed = keep
    for _ in range(_ATTEMPTS):
        plan = planned(max(aimed, least))
        if any(plan.widths == attempt.plan.widths for attempt in attempts):
            break
        fraction = measured_fraction(graph, plan.widths)
        attempts.append(_Attempt(plan, fraction))
        too_slow = fraction > keep
        close = _CLOSE * keep <= fraction <= keep
        if close or (too_slow and aimed <= least):
            break
        off = keep / fraction
        aimed = min(1.0, aimed * off * (_CAUTION if too_slow else 1.0))
    return attempts


def best_plan(
    roundings: Iterable[int], scores: Mapping[str, Tensor], make: Callable[[int], PruningPlan]
) -> PruningPlan:
    """Make a plan for each rounding, and return the one that keeps the highest sum of scores.

    Args:
        roundings: Multiples that widths are rounded to, coarsest first; at least one.
        scores: (channels,) score of each channel of every group.
        make: Makes a plan for a multiple, or raises a ValueError.

    Raises:
        ValueError: If there is no plan for any multiple; the finest says what can be reached.
    """
    plans: list[PruningPlan] = []
    refusals: list[ValueError] = []
    for round_to in roundings:
        try:
            plans.append(make(round_to))
        except ValueError as refusal:  # noqa: PERF203 - making a plan takes far longer
            refusals.append(refusal)
    if not plans:
        raise refusals[-1]
    return max(plans, key=lambda plan: kept_score(plan, scores))


def kept_score(plan: PruningPlan, scores: Mapping[str, Tensor]) -> float:
    """Return the sum of the scores of the channels that are kept, of the groups that are scored."""
    kept = [scores[name][group.channels] for name, group in plan.groups.items()]
    return sum(float(values.sum()) for values in kept if bool(values.isfinite().all()))


def measured_fraction(graph: ChannelGraph, widths: Mapping[str, int], rounds: int = 5) -> float:
    """Time the network at some widths against the original one, turn and turn about.

    Args:
        graph: The traced model.
        widths: Channels by group name.
        rounds: Number of turns; the median of their ratios counts, so that what else the machine does has no say.

    Returns:
        The time at these widths as a fraction of that of the original network.
    """
    original_times, times = forward_times(graph, [{}, widths], rounds, milliseconds=200)
    return ratios(times, original_times).median


def by_score_per_cost(
    graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, cost: CostModel, limits: Limits
) -> PruningPlan:
    """Rank channels by score for each unit of cost that pruning them saves.

    What that saves depends on the widths that come out, which takes a few rounds.

    Args:
        graph: The traced model.
        scores: (channels,) float64 score of each channel of every group.
        keep: Fraction of the original cost that may be kept.
        cost: What the network costs.
        limits: The widths that are allowed.
    """
    widths = limits.most
    for _ in range(_ROUNDS):
        saved = _saved_by_a_channel(cost, widths, limits).tolist()
        ranking = {
            name: _per_cost(scores[name], cost_of_channel)
            for name, cost_of_channel in zip(graph.groups, saved, strict=True)
        }
        plan = fit(graph, ranking, keep, cost, limits)
        planned_widths = np.array([plan.widths[name] for name in graph.groups])
        # Halfway, since two groups that share layers would else take turns.
        widths = (widths + planned_widths) // 2
    return plan


def _per_cost(scores: Tensor, cost: float) -> Tensor:
    """Return scores for each unit of cost; of two that are below 0, the one that costs more is the worse."""
    return torch.where(scores < 0, scores * cost, scores / cost)


def _saved_by_a_channel(cost: CostModel, widths: np.ndarray, limits: Limits) -> np.ndarray:
    """Return what one channel less of each group saves: (groups,)."""
    cost_now = cost.of(widths)
    eighths = cost.sizes // 8
    tried = np.maximum(limits.step, eighths)  # one channel alone may save less than rounding hides
    fewer_by = np.clip(widths - 1, 1, tried)
    saved = np.empty(len(widths))
    for group, fewer in enumerate(fewer_by.tolist()):
        narrower = widths.copy()
        narrower[group] = max(widths[group] - fewer, 1)
        saved[group] = (cost_now - cost.of(narrower)) / fewer
    return saved.clip(min=saved.max(initial=0) * 1e-6 + 1e-12)
