"""A plan that fits a budget, from one ranking of the channels of all groups."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.best_first import BestFirst
from lightning_prune.planning.budget import Budget
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.scores import best_channels
from lightning_prune.planning.within_budget import WithinBudget
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["fit"]


def fit(graph: ChannelGraph, scores: Mapping[str, Tensor], keep: float, cost: CostModel, limits: Limits) -> PruningPlan:
    """Keep as many of the best channels as the budget allows.

    Where rounding leaves more than a twentieth of the budget, groups exchange channels, or the one group that rounding
    is too coarse for is rounded finer.

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
    ranking = BestFirst([scores[name] for name in graph.groups])
    within = WithinBudget(ranking, limits, cost, affordable)
    finer = None
    if cost.of(limits.now) <= affordable:
        rounded = widths = limits.now
    else:
        rounded = within.best()
        widened = within.widened(rounded)
        widths, finer = within.nearer(widened)
    names = list(graph.groups)
    budget = Budget(
        metric=cost.metric,
        asked=keep,
        reachable=reachable,
        rounded=cost.fraction(rounded),
        achieved=cost.fraction(widths),
        original=cost.original,
        round_to=limits.round_to,
        finer=None if finer is None else {names[finer.group]: finer.round_to},
    )
    width_of = zip(names, widths.tolist(), strict=True)
    plan = graph.plan({name: best_channels(scores[name], width) for name, width in width_of})
    return replace(plan, budget=budget.to_json())
