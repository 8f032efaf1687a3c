"""The training batches that prunes look at: what they are, and how the module runs on them."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_prune.callbacks.batches import training_batches
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.graph.entry import as_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed
from lightning_prune.surgery.compensation.lockstep import Run

__all__ = ["PruneBatches", "arguments_of"]

_REMEDY = (
    "Let `forward` take the inputs of a batch, override run_on_batch of the callback, or set compensate='none' and a "
    "criterion that needs no data, such as 'l1'."
)


@dataclass(frozen=True)
class PruneBatches:
    """Draw training batches for scores and compensation, and run the module on them without their labels.

    All ranks draw the same ones; the first rank works with them, in the precision of the weights.

    Args:
        trainer: The trainer.
        count: Number of batches.
        run: Runs the LightningModule, or a copy, on a batch.
    """

    trainer: "pl.Trainer"
    count: int
    run: Run

    def draw(self, seed: int) -> list[Any]:
        """Return the batches of one prune.

        Args:
            seed: Decides which samples of the training split, and how they are augmented.
        """
        return training_batches(self.trainer, self.count, seed, of_all_ranks=True)

    def run_on(self, model: nn.Module, batch: Any) -> Any:
        """Run the LightningModule, a copy or an average of it, on a batch."""
        device = next(iter(named_tensors(model).values())).device  # averages may lie on another one than the module
        return self.run(model, move_data_to_device(batch, device))

    def check(self, setting: str, submodule: str) -> None:
        """Raise a ValueError, on all ranks, if there is no batch or the module cannot be run on one.

        Args:
            setting: What looks at the batches, for the message.
            submodule: Dotted name of the submodule that is pruned; empty for the module itself.
        """
        batches = training_batches(self.trainer, 1, seed=0, of_all_ranks=True)
        if not batches:
            raise ValueError(f"{setting} looks at training batches, and this run has none.")
        decided_by_first_rank(self.trainer, lambda: self._try(batches[0], setting, submodule))

    def _try(self, batch: Any, setting: str, submodule: str) -> None:
        module = self.trainer.lightning_module
        name = type(module).__name__
        runs: list[bool] = []
        try:
            with undisturbed(module):
                twin = shared_twin(module, named_tensors(module))
                pruned = twin.get_submodule(submodule)
                pruned.register_forward_pre_hook(lambda *_: runs.append(True))
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


def arguments_of(example_inputs: Any) -> int:
    """Return how many positional arguments example inputs are."""
    args, _ = as_call(example_inputs)
    return max(1, len(args))
