"""Plans under a budget: what a plan costs, which widths are allowed, and which channels are kept."""

from lightning_prune.planning.allocation import plan, plan_by_layer
from lightning_prune.planning.by_time import measured_fraction, plan_for_latency, timed_plan, with_best_rounding
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.profiling import profile
from lightning_prune.planning.timing import measure_latency

__all__ = [
    "CostModel",
    "measure_latency",
    "measured_fraction",
    "plan",
    "plan_by_layer",
    "plan_for_latency",
    "profile",
    "timed_plan",
    "with_best_rounding",
]
