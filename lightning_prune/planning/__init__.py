"""Plans under a budget: what a plan costs, which widths are allowed, and which channels are kept."""

from lightning_prune.planning.budget import Budget, check_keep, kept_of
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.planning.by_score import plan
from lightning_prune.planning.by_time import measured_fraction
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.metrics import METRICS, Metric, metric_named
from lightning_prune.planning.narrow import narrow_groups
from lightning_prune.planning.profiling import profile
from lightning_prune.planning.ranking import RANKINGS, check_ranking, isomorphic_groups
from lightning_prune.planning.reachability import check_reachable, reachable
from lightning_prune.planning.scores import checked_scores
from lightning_prune.planning.tables import read_table, use_table
from lightning_prune.planning.timing import measure_latency, times_in_turns

__all__ = [
    "METRICS",
    "RANKINGS",
    "Budget",
    "CostModel",
    "Limits",
    "Metric",
    "check_keep",
    "check_ranking",
    "check_reachable",
    "checked_scores",
    "isomorphic_groups",
    "kept_of",
    "measure_latency",
    "measured_fraction",
    "metric_named",
    "narrow_groups",
    "plan",
    "plan_by_layer",
    "profile",
    "reachable",
    "read_table",
    "times_in_turns",
    "use_table",
]
