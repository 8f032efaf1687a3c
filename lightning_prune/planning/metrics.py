"""Metrics: what a budget can be a fraction of, and how plans are made for each; found by name in one table."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.by_time import (
    ROUNDINGS,
    Planner,
    best_plan,
    by_score_per_cost,
    measured_fraction,
    timed_plan,
)
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.fitting import fit
from lightning_prune.planning.limits import Limits, WidthSettings, check_whole_number
from lightning_prune.planning.profiling import profile
from lightning_prune.planning.tables import TABLE
from lightning_prune.planning.telling import tell_of_budget
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["METRICS", "CountedMetric", "MeasuredTime", "Metric", "metric_named"]

Scores = Mapping[str, Tensor]  # (channels,) of each group


class Metric(ABC):
    """What a budget is a fraction of.

    Args:
        name: How settings call it.

    Attributes:
        counted: Whether costs are worked out from the widths alone, without running the network.
    """

    counted: bool

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def cost_model(self, graph: ChannelGraph) -> CostModel:
        """Return what the network costs at any widths; measures first where that has to be."""

    @abstractmethod
    def roundings(self, round_to: int | str) -> Sequence[int]:
        """Return the multiples that widths may be rounded to, coarsest first.

        Args:
            round_to: A multiple, or ``"auto"``.

        Raises:
            ValueError: If the setting is no multiple that this metric knows.
        """

    @abstractmethod
    def plan_by_score(self, graph: ChannelGraph, scores: Scores, keep: float, settings: WidthSettings) -> PruningPlan:
        """Make a plan for which the channels of all groups compete.

        Args:
            graph: The traced model.
            scores: (channels,) float64 score of each channel of every group, as `checked_scores` returns them.
            keep: Fraction of the original cost that may be kept.
            settings: What is asked of the widths.

        Raises:
            ValueError: If the budget cannot be reached, or a setting is out of range.
        """

    @abstractmethod
    def plan_by_layer(
        self, graph: ChannelGraph, thresholds: Scores, scores: Scores, keep: float, settings: WidthSettings
    ) -> PruningPlan:
        """Make a plan for which it is said of each channel when it is pruned.

        Args:
            graph: The traced model.
            thresholds: (channels,) float64 of every group: channels with the lowest numbers are pruned first.
            scores: (channels,) float64 score of each channel of every group, which says what several plans are worth.
            keep: Fraction of the original cost that may be kept.
            settings: What is asked of the widths.

        Raises:
            ValueError: If the budget cannot be reached, or a setting is out of range.
        """

    @abstractmethod
    def check_reachable(self, graph: ChannelGraph, keep: float, settings: WidthSettings) -> None:
        """Raise a ValueError, with the range that can be reached, if a budget cannot.

        Args:
            graph: The traced model.
            keep: Fraction of the original cost that may be kept.
            settings: What is asked of the widths.
        """

    def least_limits(self, graph: ChannelGraph, settings: WidthSettings) -> Limits:
        """Return the limits of the original network with the finest rounding."""
        return Limits.of_original(graph, settings, self.roundings(settings.round_to)[-1])


class CountedMetric(Metric):
    """FLOPs, parameters or channels: known to the unit without running the network."""

    counted = True

    def cost_model(self, graph: ChannelGraph) -> CostModel:
        """Return what the network costs at any widths."""
        return CostModel(graph, self.name)

    def roundings(self, round_to: int | str) -> Sequence[int]:
        """Return the one multiple that is asked for."""
        return [check_whole_number("round_to", round_to)]

    def plan_by_score(self, graph: ChannelGraph, scores: Scores, keep: float, settings: WidthSettings) -> PruningPlan:
        """Keep as many of the best channels as the budget allows."""
        (round_to,) = self.roundings(settings.round_to)
        limits = Limits(graph, scores, round_to, settings.min_channels, settings.cap)
        cost = self.cost_model(graph)
        plan = fit(graph, scores, keep, cost, limits)
        tell_of_budget(plan, cost, limits)
        return plan

    def plan_by_layer(
        self, graph: ChannelGraph, thresholds: Scores, scores: Scores, keep: float, settings: WidthSettings
    ) -> PruningPlan:
        """Keep as many channels of the highest thresholds as the budget allows."""
        return self.plan_by_score(graph, thresholds, keep, settings)

    def check_reachable(self, graph: ChannelGraph, keep: float, settings: WidthSettings) -> None:
        """Count the smallest network."""
        limits = self.least_limits(graph, settings)
        limits.check(keep, self.name, limits.reachable(self.cost_model(graph)))


class Time(Metric):
    """The time of a forward pass; channels are ranked by score for each millisecond that pruning them saves.

    Note:
        Ranking by score for each unit of latency is how a greedy solver treats the knapsack problem of Shen et al.,
        "Structural Pruning via Latency-Saliency Knapsack" (NeurIPS 2022), whose latency comes from a table of layers.
    """

    counted = False

    def roundings(self, round_to: int | str) -> Sequence[int]:
        """Return the one multiple that is asked for; for ``"auto"`` several to try."""
        return ROUNDINGS if round_to == "auto" else [check_whole_number("round_to", round_to)]

    def plan_by_score(self, graph: ChannelGraph, scores: Scores, keep: float, settings: WidthSettings) -> PruningPlan:
        """Prune channels in the order of their scores for each millisecond until the time fits."""
        return self._best(by_score_per_cost, graph, scores, scores, keep, settings)

    def plan_by_layer(
        self, graph: ChannelGraph, thresholds: Scores, scores: Scores, keep: float, settings: WidthSettings
    ) -> PruningPlan:
        """Prune channels in the order of their thresholds until the time fits."""
        return self._best(fit, graph, thresholds, scores, keep, settings)

    def _best(
        self,
        planner: Planner,
        graph: ChannelGraph,
        ranking: Scores,
        scores: Scores,
        keep: float,
        settings: WidthSettings,
    ) -> PruningPlan:
        """Make a plan for each rounding, and take the one whose channels score highest."""

        def limits_of(round_to: int) -> Limits:
            return Limits(graph, ranking, round_to, settings.min_channels, settings.cap)

        def make(round_to: int) -> PruningPlan:
            limits = limits_of(round_to)
            return self._made(planner, graph, ranking, keep, limits)

        plan = best_plan(self.roundings(settings.round_to), scores, make)
        round_to = (plan.budget or {})["round_to"]
        cost = self.cost_model(graph)
        limits = limits_of(round_to)
        tell_of_budget(plan, cost, limits)
        return plan

    def _made(self, planner: Planner, graph: ChannelGraph, ranking: Scores, keep: float, limits: Limits) -> PruningPlan:
        """Make a plan whose time is predicted."""
        return planner(graph, ranking, keep, self.cost_model(graph), limits)


class MeasuredTime(Time):
    """The time of a forward pass on the device where the model is, predicted by a profile and then measured.

    Note:
        Predicting it from a fit, and correcting the budget by timing networks, is done here.
    """

    def cost_model(self, graph: ChannelGraph) -> CostModel:
        """Return what the network takes at any widths, in milliseconds; profiles a network that was not."""
        if self.name not in graph.terms:
            profile(graph)
        return CostModel(graph, self.name)

    def _made(self, planner: Planner, graph: ChannelGraph, ranking: Scores, keep: float, limits: Limits) -> PruningPlan:
        """Time plans until one fits."""
        cost = self.cost_model(graph)
        if not graph.groups:  # there is nothing to time
            return fit(graph, ranking, keep, cost, limits)
        with progress("Timing smaller networks"):
            return timed_plan(planner, graph, ranking, keep, cost, limits)

    def check_reachable(self, graph: ChannelGraph, keep: float, settings: WidthSettings) -> None:
        """Time the smallest network where the profile says that it is too slow."""
        limits = self.least_limits(graph, settings)
        if not graph.groups:
            limits.check(keep, self.name, 1.0)
            return
        reachable = limits.reachable(self.cost_model(graph))
        if reachable > keep:
            widths = dict(zip(graph.groups, limits.least.tolist(), strict=True))
            reachable = measured_fraction(graph, widths)
        limits.check(keep, self.name, reachable)


class TabledTime(Time):
    """The time of a forward pass as a latency table of another runtime or machine predicts it."""

    def cost_model(self, graph: ChannelGraph) -> CostModel:
        """Return what the network takes at any widths, in milliseconds.

        Raises:
            ValueError: If the graph was given no table.
        """
        if self.name not in graph.terms:
            raise ValueError("A budget by a latency table needs one: lightning_prune.planning.use_table(graph, table).")
        return CostModel(graph, self.name)

    def check_reachable(self, graph: ChannelGraph, keep: float, settings: WidthSettings) -> None:
        """Ask the table for the smallest network."""
        limits = self.least_limits(graph, settings)
        limits.check(keep, self.name, limits.reachable(self.cost_model(graph)))


METRICS: dict[str, Metric] = {
    "flops": CountedMetric("flops"),
    "params": CountedMetric("params"),
    "channels": CountedMetric("channels"),
    "latency": MeasuredTime("latency"),
}
_BY_TABLE = TabledTime(TABLE)


def metric_named(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> metric_named("flops").counted
        True
        >>> metric_named("macs")
        Traceback (most recent call last):
        ValueError: metric must be one of flops, params, channels, latency; got 'macs'.
    """
    if name == TABLE:  # which a graph has once it was given a table
        return _BY_TABLE
    if name not in tuple(METRICS):
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {name!r}.")
    return METRICS[name]
