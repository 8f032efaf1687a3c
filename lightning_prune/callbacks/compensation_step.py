"""Compensation in the middle of training: on batches of the training split, worked out by the first rank for all."""

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_prune.callbacks.batches import taken, training_batches
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.trainer_state import averaged_copies
from lightning_prune.graph.entry import as_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation import Compensation, compensation
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed
from lightning_prune.surgery.compensation.lockstep import Run

__all__ = ["Compensator", "arguments_of", "run_forward"]


def run_forward(model: nn.Module, batch: Any, arguments: int = 1) -> Any:
    """Run a model on what its ``forward`` takes from a batch; labels are left out.

    Args:
        model: The model.
        batch: A tensor; a list or tuple, of which the first entries are taken; or a dictionary, of which ``forward``
            is given the entries that it has a name for, or all as one argument if it has a name for none.
        arguments: How many entries of a list or tuple are taken.
    """
    args, kwargs = taken(model, batch, arguments)
    return model(*args, **kwargs)


@dataclass(frozen=True)
class Compensator:
    """What works out how the module of a trainer, and each averaged copy of it, make up for a prune.

    All ranks draw the same batches; the first one works with them, in the precision of the weights, and the others get
    its values, bit for bit.

    Args:
        trainer: The trainer.
        method: One of `lightning_prune.surgery.compensation.METHODS`.
        count: Number of training batches.
        run: Runs the LightningModule, or a copy, on a batch.
    """

    trainer: "pl.Trainer"
    method: str
    count: int
    run: Run

    def check(self) -> None:
        """Raise a ValueError, on all ranks, if there is no batch or the module cannot be run on one."""
        batches = self._batches(count=1, seed=0)
        decided_by_first_rank(self.trainer, lambda: self._try(batches))

    def compensations(self, plan: PruningPlan, seed: int) -> list[Compensation]:
        """Work out the compensation of the module and of each averaged copy, without changing them.

        Args:
            plan: The channels to keep.
            seed: Decides which samples of the training split, and how they are augmented.

        Returns:
            The same on every rank; none if nothing is to be compensated.
        """
        if self.method == "none":
            return []
        batches = self._batches(self.count, seed)
        models = [self.trainer.lightning_module, *averaged_copies(self.trainer)]

        def of_all() -> list[Compensation]:
            return [_on_cpu(compensation(model, plan, self.method, batches, self._run)) for model in models]

        with progress(f"Compensating {type(models[0]).__name__}"):
            found: list[Compensation] = decided_by_first_rank(self.trainer, of_all)
        return found

    def _batches(self, count: int, seed: int) -> list[Any]:
        batches = training_batches(self.trainer, count, seed, of_all_ranks=True)
        if not batches:
            raise ValueError(f"compensate={self.method!r} looks at training batches, and this run has none.")
        return batches

    def _run(self, model: nn.Module, batch: Any) -> Any:
        device = next(iter(named_tensors(model).values())).device  # averages may lie on another one than the module
        return self.run(model, move_data_to_device(batch, device))

    def _try(self, batches: list[Any]) -> None:
        module = self.trainer.lightning_module
        try:
            with undisturbed(module):
                self._run(shared_twin(module, named_tensors(module)), batches[0])
        except Exception as raised:
            name = type(module).__name__
            raise ValueError(
                f"compensate={self.method!r} runs {name} on training batches, which fails with "
                f"{type(raised).__name__}: {raised} Let `forward` take the inputs of a batch, override run_on_batch of "
                "the callback, or set compensate='none'."
            ) from raised


def arguments_of(example_inputs: Any) -> int:
    """Return how many positional arguments example inputs are."""
    args, _ = as_call(example_inputs)
    return max(1, len(args))


def _on_cpu(found: Compensation) -> Compensation:
    """Return a compensation that can be sent to other ranks, whose devices are others."""
    return replace(found, tensors={name: tensor.cpu() for name, tensor in found.tensors.items()})
