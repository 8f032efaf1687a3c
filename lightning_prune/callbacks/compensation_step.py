"""Compensation in the middle of training: worked out by the first rank for all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.trainer_state import averaged_copies
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation import Compensation, compensation
from lightning_prune.surgery.compensation.lockstep import Run

__all__ = ["compensations"]


def compensations(
    trainer: "pl.Trainer", plan: PruningPlan, method: str, batches: Sequence[Any], run: Run
) -> list[Compensation]:
    """Work out how the module of a trainer, and each averaged copy of it, make up for a prune, without changing them.

    Args:
        trainer: The trainer.
        plan: The channels to keep.
        method: One of `lightning_prune.surgery.compensation.METHODS` but ``"none"``.
        batches: The batches, the same on every rank.
        run: Runs the LightningModule, or a copy, on a batch.

    Returns:
        The same on every rank, bit for bit.

    Raises:
        ValueError: If there is no batch, or what layers are given is not finite.
    """
    models = [trainer.lightning_module, *averaged_copies(trainer)]

    def of_all() -> list[Compensation]:
        return [_on_cpu(compensation(model, plan, method, batches, run)) for model in models]

    with progress(f"Compensating {type(models[0]).__name__}"):
        found: list[Compensation] = decided_by_first_rank(trainer, of_all)
    return found


def _on_cpu(found: Compensation) -> Compensation:
    """Return a compensation that can be sent to other ranks, whose devices are others."""
    return replace(found, tensors={name: tensor.cpu() for name, tensor in found.tensors.items()})
