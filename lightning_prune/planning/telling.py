"""What is said of a plan that leaves much of its budget: where rounding is too coarse for it, and what to set."""

import warnings

import numpy as np

from lightning_prune.planning.budget import NEARLY_ALL, kept_of
from lightning_prune.planning.cost import CostModel, integers
from lightning_prune.planning.limits import Limits
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["tell_of_budget"]


def tell_of_budget(plan: PruningPlan, cost: CostModel, limits: Limits) -> None:
    """Warn if a plan prunes nothing more, leaves much of its budget, or rounds a group finer than was asked.

    Args:
        plan: The channels to keep, with its budget.
        cost: What the network costs, as it is predicted.
        limits: The widths that are allowed.
    """
    budget = plan.budget or {}
    kept_now = zip(cost.groups, limits.now.tolist(), strict=True)
    widths = integers(plan.widths.get(name, width) for name, width in kept_now)
    is_pruned = (limits.now < cost.sizes).any()
    if is_pruned and budget["asked"] < 1 and (widths == limits.now).all():
        _warn(
            f"keep={budget['asked']} prunes nothing: fractions are of the original network, of whose {cost.metric} "
            f"{budget['achieved']:.3f} is left since it was pruned before; lower keep."
        )
        return
    is_short = budget["achieved"] < NEARLY_ALL * budget["asked"]
    if is_short and (widths < limits.most).any():
        kept = kept_of(budget)
        coarsest = _coarsest(widths, cost, limits)
        _warn(f"{kept}: {coarsest}")
    elif "finer" in budget:
        kept = kept_of(budget)
        _warn(f"{kept}: round_to={limits.round_to} is too coarse for it; lower round_to to round all groups alike.")


def _coarsest(widths: np.ndarray, cost: CostModel, limits: Limits) -> str:
    """Name the group whose next step costs most, and what to set."""
    cost_now = cost.fraction(widths)
    steps = {}
    for group, name in enumerate(cost.groups):
        wider = widths.copy()
        wider[group] = limits.above(widths[group], group)
        steps[name] = cost.fraction(wider) - cost_now
    name = max(steps, key=lambda name: steps[name])
    step = steps[name]
    group = cost.groups.index(name)
    if limits.is_block(group):
        at_least = cost_now + step
        return f"{name!r} is {step:.3f} of the cost, and is pruned whole or not; raise keep to {at_least:.3f} for it."
    remedy = "lower round_to" if limits.round_to > 1 else f"raise keep to {cost_now + step:.3f} for it"
    return f"one step of round_to={limits.round_to} in {name!r} is {step:.3f} of the cost; {remedy}."


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
