"""Criteria: pure functions that score channels, one per file; higher scores are kept."""

from lightning_prune.criteria.magnitude import magnitude

__all__ = ["magnitude"]
