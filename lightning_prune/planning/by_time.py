"""Plans that meet a budget of measured time."""

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.fitting import Limits, fit
from lightning_prune.planning.profiling import at_widths, profile
from lightning_prune.planning.timing import timed
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan

__all__ = [
    "by_score_per_cost",
    "kept_score",
    "measured_fraction",
    "plan_for_latency",
    "timed_plan",
    "with_best_rounding",
]

_CLOSE = 0.97  # of the budget: near enough to stop
_ATTEMPTS = 8
_ROUND_TO = (32, 16, 8, 4, 1)  # coarsest first: if not even single channels will do, nothing does


def plan_for_latency(
    graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, round_to: int | str, min_channels: int
) -> PruningPlan:
    """Choose the channels that stay so that a forward pass takes at most a fraction of its time, as measured.

    Channels are ranked by their score for each millisecond that removing them saves, as the profile of the network
    predicts it; see `timed_plan` for how the budget is met.

    Args:
        graph: The traced model.
        scores: (channels,) float64 score of each channel of every group, as for `lightning_prune.pruning_plan`.
        keep: Fraction of the original time that may be taken.
        round_to: Layers that lose channels keep a multiple of this many; ``"auto"`` tries several and keeps the plan
            with the highest sum of scores.
        min_channels: Least number of channels of a group.

    Returns:
        The plan.

    Raises:
        ValueError: If no network within the limits is fast enough, with what was measured.

    Note:
        Ranking by importance for each unit of latency is how a greedy solver treats the knapsack problem of Shen et
        al., "Structural Pruning via Latency-Saliency Knapsack" (NeurIPS 2022), whose latency comes from a table of
        layers; predicting it from a fit, and correcting the budget by timing whole networks, is done here.
    """
    if "latency" not in graph.terms:
        profile(graph)

    def make(step: int) -> PruningPlan:
        limits = Limits(graph, scores, step, min_channels)
        cost = CostModel(graph, "latency")
        return timed_plan(graph, keep, limits, partial(by_score_per_cost, graph, scores, limits, cost))

    with progress("Timing smaller networks"):
        return with_best_rounding(round_to, scores, make)


def with_best_rounding(
    round_to: int | str, scores: Mapping[str, Tensor], make: Callable[[int], PruningPlan]
) -> PruningPlan:
    """Make a plan; for ``"auto"`` several, of which the one stays that keeps the highest sum of scores.

    Args:
        round_to: What layers keep a multiple of, or ``"auto"``.
        scores: (channels,) score of each channel of every group.
        make: Makes a plan for a multiple.

    Raises:
        ValueError: If there is no such plan for any multiple.
    """
    if round_to != "auto":
        return make(int(round_to))
    made: list[PruningPlan] = []
    for step in _ROUND_TO:
        with suppress(ValueError):
            made.append(make(step))
    # If there is none, the last says what can be reached.
    return max(made, key=lambda plan: kept_score(plan, scores)) if made else make(_ROUND_TO[-1])


def timed_plan(
    graph: ChannelGraph, keep: float, limits: Limits, planned: Callable[[float], PruningPlan]
) -> PruningPlan:
    """Aim at budgets of predicted time until the measured time fits.

    Each plan is timed against the whole network, turn and turn about, and the next one aims at as much less, or more,
    as the last one was off.

    Args:
        graph: The traced model, profiled.
        keep: Fraction of the original time that may be taken.
        limits: The widths that are allowed.
        planned: Makes a plan for a fraction of the predicted time.

    Returns:
        The slowest plan that fits. Its ``budget`` tells the measured fraction as ``achieved`` and what the profile
        predicted as ``predicted``.

    Raises:
        ValueError: If no plan that was tried is fast enough.
    """
    cost = CostModel(graph, "latency")
    floor = limits.reachable(cost)
    aimed, tried = keep, dict[tuple[int, ...], tuple[float, PruningPlan]]()
    for _ in range(_ATTEMPTS):
        plan = planned(max(aimed, floor))
        widths = tuple(plan.widths.values())
        if widths in tried:
            break
        measured = measured_fraction(graph, plan.widths)
        tried[widths] = measured, plan
        if _CLOSE * keep <= measured <= keep or (measured > keep and aimed <= floor):
            break
        aimed = min(1.0, aimed * keep / measured * (0.99 if measured > keep else 1.0))
    measured, plan = max(
        (each for each in tried.values() if each[0] <= keep), key=lambda each: each[0], default=(math.inf, plan)
    )
    if measured == math.inf:
        raise ValueError(
            f"keep={keep} of the latency cannot be reached: the fastest network within round_to={limits.round_to} and "
            f"min_channels={limits.min_channels} that was timed took {min(taken for taken, _ in tried.values()):.3f} "
            "of the original time. Raise keep, or lower round_to."
        )
    assert plan.budget is not None
    told = {**plan.budget, "asked": keep, "achieved": measured, "predicted": plan.budget["achieved"]}
    return PruningPlan(plan.groups, plan.shapes, told)


def kept_score(plan: PruningPlan, scores: Mapping[str, Tensor]) -> float:
    """Return the sum of the scores of the channels that stay, of the groups that are scored."""
    return sum(
        float(scores[name][group.channels].sum())
        for name, group in plan.groups.items()
        if bool(scores[name][group.channels].isfinite().all())
    )


def measured_fraction(graph: ChannelGraph, widths: Mapping[str, int], rounds: int = 5) -> float:
    """Time the network at some widths against the whole one, turn and turn about.

    Args:
        graph: The traced model.
        widths: Channels by group name.
        rounds: Number of turns; the median of their ratios counts, which leaves out what else the machine does.

    Returns:
        The time at these widths as a fraction of that of the whole network.
    """
    device = next(graph.model.parameters()).device
    ratios = []
    for _ in range(rounds):
        taken = []
        for each in ({}, dict(widths)):
            with at_widths(graph, each) as run:
                warm = max(timed(run, device), 1e-3)
                runs = int(min(20, max(3, 200 / warm)))  # enough to trust the median, or a fifth of a second
                taken.append(statistics.median(timed(run, device) for _ in range(runs)))
        ratios.append(taken[1] / taken[0])
    return statistics.median(ratios)


def by_score_per_cost(
    graph: ChannelGraph, scores: Mapping[str, Tensor], limits: Limits, cost: CostModel, keep: float
) -> PruningPlan:
    """Rank channels by score for each unit of cost that removing them saves.

    What that saves depends on the widths that come out, which takes a few rounds.

    Args:
        graph: The traced model.
        scores: (channels,) float64 score of each channel of every group.
        limits: The widths that are allowed.
        cost: What the network costs.
        keep: Fraction of the original cost that may stay.
    """
    widths = limits.most
    for _ in range(4):
        saved = _saved_by_a_channel(cost, widths, limits)
        ranked = {name: _for_each(scores[name], float(time)) for name, time in zip(graph.groups, saved, strict=True)}
        plan = fit(graph, ranked, keep, cost, limits)
        # Halfway, since two groups that share layers would else take turns.
        widths = (widths + np.array([plan.widths[name] for name in graph.groups])) // 2
    return plan


def _for_each(scores: Tensor, cost: float) -> Tensor:
    """Return scores for each unit of cost; of two that are below 0, the one that costs more is the worse."""
    return torch.where(scores < 0, scores * cost, scores / cost)


def _saved_by_a_channel(cost: CostModel, widths: np.ndarray, limits: Limits) -> np.ndarray:
    """Return what one channel less of each group saves: (groups,)."""
    saved = np.empty(len(widths))
    now = cost.of(widths)
    for group, width in enumerate(widths):
        step = max(1, min(int(width) - 1, max(int(limits.step[group]), int(cost.sizes[group]) // 8)))
        fewer = widths.copy()
        fewer[group] = max(int(width) - step, 1)
        saved[group] = (now - cost.of(fewer)) / max(int(width) - int(fewer[group]), 1)
    return saved.clip(min=saved.max(initial=0) * 1e-6 + 1e-12)
