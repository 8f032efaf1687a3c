"""Measured time: of one forward pass, of a network at any widths, and plans that meet a budget of it."""

from lightning_prune.latency.measuring import measure_latency
from lightning_prune.latency.planning import measured_fraction, plan_for_latency, timed_plan, with_best_rounding
from lightning_prune.latency.profiling import profile

__all__ = ["measure_latency", "measured_fraction", "plan_for_latency", "profile", "timed_plan", "with_best_rounding"]
