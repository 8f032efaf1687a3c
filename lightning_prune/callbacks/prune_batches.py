"""The training batches that prunes look at: what they are, and how the module runs on them."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_prune.callbacks.batches import training_batches
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.rehearsal import TRAINING, VALIDATION, Rehearsal, quietened
from lightning_prune.graph.entry import Step, as_call
from lightning_prune.graph.nested import plainly
from lightning_prune.graph.steps import first_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.reporting.loggers import warn
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed
from lightning_prune.surgery.compensation.lockstep import Run
from lightning_prune.unlabelled import first_entry

__all__ = ["PruneBatches", "arguments_of"]

_REMEDY = (
    "Let `forward` take the inputs of a batch, override run_on_batch of the callback, or set compensate='none' and a "
    "criterion that needs no data, such as 'l1'."
)


class PruneBatches:
    """The training batches that scores and compensation look at, without their labels.

    All ranks draw the same ones; the first rank works with them, in the precision of the weights.

    Args:
        trainer: The trainer.
        count: Number of batches for a prune.
        forward: Runs the LightningModule, or a copy, on what ``forward`` takes from a batch.

    Attributes:
        serve: Whether the module can be run on them.
    """

    def __init__(self, trainer: "pl.Trainer", count: int, forward: Run) -> None:
        self.serve = True
        self._trainer = trainer
        self._count = count
        self._run = forward
        self._drawn: list[Any] | None = None

    def of_prune(self, step: int) -> list[Any]:
        """Return the batches of one prune; they are drawn once, and kept until `forget`.

        Args:
            step: Number of the prune; decides which samples of the training split, and how they are augmented.
        """
        if self._drawn is None:
            self._drawn = training_batches(self._trainer, self._count, seed=step, of_all_ranks=True)
        return self._drawn

    def forget(self) -> None:
        """Give the batches of a prune that has been made back."""
        self._drawn = None

    def run_on(self, model: nn.Module, batch: Any) -> Any:
        """Run the LightningModule, a copy or an average of it, on a batch."""
        return self._run(model, _beside(model, plainly(batch)))

    def try_out(self, needing: Sequence[str], who: str, submodule: str) -> None:
        """Run a copy of the module on a batch, by its ``forward``, or else as its ``training_step`` does.

        Of a batch whose first entry is a list, ``forward`` is given one of that list, or else all of it.

        Args:
            needing: The settings that cannot do without. If there are none, and the module cannot be run, a warning
                says so, and batches do not serve.
            who: Name of the callback.
            submodule: Dotted name of the submodule that is pruned; empty for the module itself.

        Raises:
            ValueError: On all ranks, if some setting cannot do without, and there is no batch or the module cannot be
                run on one.
        """
        try:
            self._find_a_way(" with ".join(needing) or who, submodule)
        except ValueError as reason:
            if needing:
                raise
            self.serve = False
            warn(f"{who} ranks channels without batches and does not compensate for the prune: {reason}")

    def _find_a_way(self, setting: str, submodule: str) -> None:
        batches = training_batches(self._trainer, 1, seed=0, of_all_ranks=True)
        if not batches:
            raise ValueError(f"{setting} looks at training batches, and this run has none.")
        ways = self._run, _run_first_entry, self.training_step, self._as_training_calls, self._validation_step
        reasons = []
        for self._run in ways:
            reason = self._reason_against(batches[0], setting, submodule)
            if reason is None:
                return
            reasons.append(reason)
        self._run = ways[0]
        raise reasons[0]

    def _reason_against(self, batch: Any, setting: str, submodule: str) -> ValueError | None:
        """Return why the module cannot be run in the way that is being tried, the same on all ranks."""
        try:
            decided_by_first_rank(self._trainer, lambda: self._try(batch, setting, submodule))
        except ValueError as reason:
            return reason
        return None

    def training_step(self, model: nn.Module, batch: Any) -> Any:
        """Run a copy of the module as in training, where it hands to the network what `forward` would not find."""
        return self._run_step(TRAINING, model, batch)

    def _as_training_calls(self, model: nn.Module, batch: Any) -> Any:
        """Run a copy of the module on what training hands to ``forward``, which may return other things there."""
        step = self._step(TRAINING, batch)
        call = first_call(self._trainer.lightning_module, [""], step)
        if call is None:
            raise ValueError("training_step does not call forward.")
        args, kwargs = _beside(model, call)
        return model(*args, **kwargs)

    def _validation_step(self, model: nn.Module, batch: Any) -> Any:
        """Run a copy of the module as it is measured, which is what its evaluation mode is for."""
        return self._run_step(VALIDATION, model, batch)

    def _run_step(self, name: str, model: nn.Module, batch: Any) -> Any:
        args = self._step(name, batch).args
        quietened(self._trainer, model)
        run: Any = getattr(model, name)
        return run(*args)

    def _step(self, name: str, batch: Any) -> Step:
        step = Rehearsal(self._trainer, self._trainer.lightning_module).step(name, batch)
        if step is None:
            raise ValueError(f"there is no {name}, or it draws its batches by itself.")
        return step

    def _try(self, batch: Any, setting: str, submodule: str) -> None:
        module = self._trainer.lightning_module
        name = type(module).__name__
        runs: list[bool] = []
        try:
            with undisturbed(module):
                twin = shared_twin(module, named_tensors(module))
                for part in twin.get_submodule(submodule).modules():  # a step may run its layers one by one
                    part.register_forward_pre_hook(lambda *_: runs.append(True))
                self.run_on(twin, batch)
        except Exception as raised:
            kind = type(raised).__name__
            raise ValueError(
                f"{setting} runs {name} on training batches, which fails with {kind}: {raised} {_REMEDY}"
            ) from raised
        if not runs:
            raise ValueError(
                f"{setting} runs {name} on training batches, which does not run {submodule or name!r}. {_REMEDY}"
            )


def _beside(model: nn.Module, data: Any) -> Any:
    """Return data on the device of a model: averages may lie on another one than the module."""
    device = next(iter(named_tensors(model).values())).device
    return move_data_to_device(data, device)


def _run_first_entry(model: nn.Module, batch: Any) -> Any:
    """Run a model on the first entry of a batch as it is, such as a list of images."""
    return model(first_entry(batch))


def arguments_of(example_inputs: Any) -> int:
    """Return how many positional arguments example inputs are."""
    args, _ = as_call(example_inputs)
    return max(1, len(args))
