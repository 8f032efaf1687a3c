"""Compensation: what is kept of a network makes up for what is pruned of it, without training."""

from lightning_prune.surgery.compensation.compensating import METHODS, Compensation, check_method, compensation
from lightning_prune.surgery.compensation.entry import prune
from lightning_prune.surgery.compensation_report import CompensationReport, LayerError

__all__ = [
    "METHODS",
    "Compensation",
    "CompensationReport",
    "LayerError",
    "check_method",
    "compensation",
    "prune",
]
