"""Compensation in the middle of training: worked out by the first rank for all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.trainer_state import averaged_copies
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation import Compensation, compensation
from lightning_prune.surgery.compensation.copies import shared_twin
from lightning_prune.surgery.compensation.lockstep import Run

__all__ = ["compensations"]


def compensations(
    trainer: "pl.Trainer",
    plan: PruningPlan,
    method: str,
    batches: Sequence[Any],
    run: Run,
    followers: Sequence[Mapping[str, Tensor]] = (),
) -> list[Compensation]:
    """Work out how the module of a trainer, and all copies of it, make up for a prune, without changing them.

    Args:
        trainer: The trainer.
        plan: The channels to keep.
        method: One of `lightning_prune.surgery.compensation.METHODS` but ``"none"``.
        batches: The batches, the same on every rank.
        run: Runs the LightningModule, or a copy, on a batch.
        followers: What follows tensors of the module, by the names of these.

    Returns:
        That of the module, of each averaged copy and of each follower: the same on every rank, bit for bit.

    Raises:
        ValueError: If there is no batch, or what layers are given is not finite.
    """
    module = trainer.lightning_module
    models = [module, *averaged_copies(trainer), *(_with(module, tensors) for tensors in followers)]

    def of_all() -> list[Compensation]:
        return [_on_cpu(compensation(model, plan, method, batches, run)) for model in models]

    with progress(f"Compensating {type(models[0]).__name__}"):
        found: list[Compensation] = decided_by_first_rank(trainer, of_all)
    return found


def _with(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a twin of a module that has other tensors in place of some."""
    own = named_tensors(module)
    for name, tensor in tensors.items():
        other = tensor.detach().to(own[name])
        own[name] = nn.Parameter(other, requires_grad=False) if isinstance(own[name], nn.Parameter) else other
    return shared_twin(module, own)


def _on_cpu(found: Compensation) -> Compensation:
    """Return a compensation that can be sent to other ranks, whose devices are others."""
    return replace(found, tensors={name: tensor.cpu() for name, tensor in found.tensors.items()})
