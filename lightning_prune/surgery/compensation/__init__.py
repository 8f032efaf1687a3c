"""Compensation: what is kept of a network makes up for what is pruned of it, without training."""

from lightning_prune.surgery.compensation.compensating import METHODS
from lightning_prune.surgery.compensation.entry import prune
from lightning_prune.surgery.compensation_report import CompensationReport, LayerError

__all__ = ["METHODS", "CompensationReport", "LayerError", "prune"]
