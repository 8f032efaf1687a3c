"""Candidates: sub-networks of a model, given as plans, and copies of it with noise on some weights.

A candidate only says which network is meant. The tensors that make it up are in `stand_ins`.
"""

import hashlib
from dataclasses import dataclass

from lightning_prune.pruning_plan import PruningPlan

__all__ = ["Candidate", "Noise", "digest"]


@dataclass(frozen=True)
class Noise:
    """A copy of the model with Gaussian noise on the weights that produce the channels of one group.

    Attributes:
        group: The group.
        strength: Standard deviation of the noise, as a fraction of that of the weights of each layer.
        seed: Seed of the draw, which is the same on every device.
    """

    group: str
    strength: float
    seed: int


Candidate = PruningPlan | Noise


def digest(candidate: Candidate) -> str:
    """Return a hash of what a candidate is."""
    if isinstance(candidate, PruningPlan):
        return candidate.digest
    description = repr(candidate)
    return hashlib.sha256(description.encode()).hexdigest()
