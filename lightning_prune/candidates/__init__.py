"""Measurement of many sub-networks of one model: loss and accuracy of each, without building any of them."""

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.evaluator import Measured, evaluate_candidates
from lightning_prune.candidates.measures import Evaluate, classification, classification_loss
from lightning_prune.candidates.memory import Memory

__all__ = [
    "Candidate",
    "Evaluate",
    "Measured",
    "Memory",
    "Noise",
    "classification",
    "classification_loss",
    "evaluate_candidates",
]
