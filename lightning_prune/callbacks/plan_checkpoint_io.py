"""A `CheckpointIO` that carries the plan of a pruned module wherever Lightning carries its weights.

Every checkpoint of a Trainer passes through the `CheckpointIO` of its strategy: those with weights alone, those that
are written in another thread, and the weights that spawned ranks hand back. `PlanCheckpointIO` wraps the one that is
there, whatever it is. A module that was never pruned passes through it untouched.

Lightning restores the weights of a checkpoint before it calls any hook of a callback. The checkpoint and the module are
therefore brought to the same shapes as soon as the file has been read, and the module gets the shapes of the plan as
soon as it has loaded the weights.
"""

import copy
import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.followers import copies_of_callbacks
from lightning_prune.callbacks.refusals import can_prune_under
from lightning_prune.callbacks.schedule import pruning_callbacks
from lightning_prune.callbacks.trainer_state import averaged_copies, is_fitting
from lightning_prune.checkpoint import (
    CHECKPOINT_KEY,
    brings_channels_back,
    fitted,
    note_copies,
    plan_belongs_to,
    prune_copies,
    refuse_other_shapes,
    renamed_for,
    restore_shape,
    save_plan,
    saved_plan,
)
from lightning_prune.checkpoint.copies import hidden_copies
from lightning_prune.files import read_without_objects
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.reporting.loggers import warn
from lightning_prune.surgery import check_plan, prune

__all__ = ["PlanCheckpointIO", "carry_plans", "read_back"]

# Spawned ranks hand their last weights back in a file of this name, without anything else in it (Lightning 2.6).
_HANDED_BACK = ".temp.ckpt"
_RESULTS = "lightning_prune_results"  # beside them: the files that the callbacks of the first rank have named


def carry_plans(trainer: "pl.Trainer") -> None:
    """Let the checkpoints of a Trainer carry plans; nothing is done if they do, or if it cannot prune.

    Args:
        trainer: The trainer.
    """
    if not can_prune_under(trainer.strategy):
        return
    if _carrier(trainer) is None:
        trainer.strategy.checkpoint_io = PlanCheckpointIO(trainer.strategy.checkpoint_io, trainer)


def _carrier(trainer: "pl.Trainer") -> "PlanCheckpointIO | None":
    """Return what carries the plans of a trainer, wherever other wrappers have put it."""
    wrapped: Any = trainer.strategy.checkpoint_io
    while wrapped is not None and not isinstance(wrapped, PlanCheckpointIO):
        wrapped = getattr(wrapped, "checkpoint_io", None)
    return wrapped


def read_back(trainer: "pl.Trainer", path: str) -> dict[str, Any]:
    """Read a checkpoint of a trainer to see what is in it; nothing is restored, and no code in it runs.

    Args:
        trainer: The trainer.
        path: The file.

    Returns:
        Tensors and plain values; what else the file holds is left out, or refused where the `CheckpointIO` of the
        trainer has a format of its own.
    """
    try:
        return read_without_objects(path)
    except Exception:  # a file of another format, or not on this machine
        carrier = _carrier(trainer)
        present = carrier.checkpoint_io if carrier is not None else trainer.strategy.checkpoint_io
        return present.load_checkpoint(path)


class PlanCheckpointIO(CheckpointIO):
    """Write and read checkpoints as another `CheckpointIO` does, with the plan beside the weights.

    Args:
        checkpoint_io: What writes and reads the files.
        trainer: The trainer whose checkpoints they are.
    """

    def __init__(self, checkpoint_io: CheckpointIO, trainer: "pl.Trainer") -> None:
        self.checkpoint_io = checkpoint_io
        self.trainer = trainer

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        # The plan is taken here and now: an asynchronous writer copies the weights when it is called, and the module
        # may be pruned before it writes them.
        module = self.trainer.lightning_module
        if module is not None and plan_in_force(module) is not None:
            checkpoint = _with_plan(self.trainer, checkpoint, path)
            if _is_handed_back(checkpoint, path):
                checkpoint = copy.copy(checkpoint)
                checkpoint[_RESULTS] = {name: one.result_path for name, one in _pruning(self.trainer).items()}
        self.checkpoint_io.save_checkpoint(checkpoint, path, *args, **kwargs)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded = self.checkpoint_io.load_checkpoint(path, *args, **kwargs)
        module = self.trainer.lightning_module
        if module is None or not isinstance(loaded, dict):
            return loaded
        if _is_handed_back(loaded, path):
            # This is the parent of the ranks, which knows only the module that it gave to them.
            for name, result_path in loaded.pop(_RESULTS, {}).items():
                _pruning(self.trainer)[name].result_path = result_path
            content = loaded.pop(CHECKPOINT_KEY, None)
            restore_shape(module, {CHECKPOINT_KEY: content, "state_dict": loaded})
        elif "state_dict" in loaded and str(path) == str(self.trainer.ckpt_path):
            self._fit(module, loaded, path)
        return loaded

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.checkpoint_io.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        if self.trainer.lightning_module is not None:
            _Restoring.cancel_for(self.trainer.lightning_module)  # a run that failed before the weights were loaded
        self.checkpoint_io.teardown()

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped `CheckpointIO` has besides."""
        if name.startswith("__") or "checkpoint_io" not in self.__dict__:  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.checkpoint_io, name)

    def _fit(self, module: "pl.LightningModule", loaded: dict[str, Any], path: Any) -> None:
        """Bring a checkpoint that the Trainer is about to restore, and its module, to the same shapes."""
        if saved_plan(loaded) is None and plan_in_force(module) is None:
            return
        if saved_plan(loaded) is not None:
            loaded.update(renamed_for(module, loaded))
        # Training goes on from there, as it is told to.
        if not is_fitting(self.trainer) and brings_channels_back(module, loaded):
            warn(
                f"The checkpoint {str(path)!r} is one of a larger network: {type(module).__name__}, which has been "
                "pruned further, gets channels back to take its weights."
            )
        for average in averaged_copies(self.trainer):
            restore_shape(average, loaded)
        copies = [*hidden_copies(module), *copies_of_callbacks(self.trainer, module)]
        prune_copies(module, loaded, copies)
        vars(module)["load_state_dict"] = _Restoring(module, loaded).load_state_dict


class _Restoring:
    """Stands in for the ``load_state_dict`` of a module until it has loaded a checkpoint, and prunes the module then.

    Until then an unpruned module keeps its shapes, and finds the weights in the same shapes: its ``on_load_checkpoint``
    may go by them, or rebuild a layer. Callbacks find the weights as they were saved.

    Args:
        module: The module that is about to load the weights.
        loaded: The checkpoint, whose weights are changed in place.
    """

    def __init__(self, module: "pl.LightningModule", loaded: dict[str, Any]) -> None:
        self.module = module
        self.loaded = loaded
        self.plan: PruningPlan | None = saved_plan(loaded)
        self.saved: dict[str, Tensor] = loaded["state_dict"]
        loaded["state_dict"] = fitted(module, loaded)["state_dict"]
        self.offered = dict(loaded["state_dict"])

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights as the module does; those of the checkpoint are the ones that are waited for."""
        load = type(self.module).load_state_dict
        if state_dict is not self.loaded["state_dict"]:  # what a hook of the module loads before
            return load(self.module, state_dict, *args, **kwargs)
        self.cancel_for(self.module)
        if self.plan is not None:  # what does not fit is refused before the first tensor is loaded
            refuse_other_shapes(self.module, state_dict)
            check_plan(self.module, self.plan)
        try:
            keys = load(self.module, state_dict, *args, **kwargs)
        except RuntimeError:
            refuse_other_shapes(self.module, state_dict)  # says it in fewer words
            raise
        if self.plan is not None:
            prune(self.module, self.plan)
        for name, tensor in self.saved.items():
            if state_dict.get(name) is self.offered[name]:  # unless a hook of the module has changed it
                state_dict[name] = tensor
        return keys

    @classmethod
    def cancel_for(cls, module: "pl.LightningModule") -> None:
        """Give a module its own ``load_state_dict`` back, if it waits for the weights of a checkpoint."""
        stand_in = vars(module).get("load_state_dict")
        if isinstance(getattr(stand_in, "__self__", None), cls):
            del vars(module)["load_state_dict"]


def _with_plan(trainer: "pl.Trainer", checkpoint: dict[str, Any], path: Any) -> dict[str, Any]:
    """Return a checkpoint with the plan of the module, if the weights in it are those of the module."""
    module = trainer.lightning_module
    weights = checkpoint if _is_handed_back(checkpoint, path) else checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not plan_belongs_to(module, weights):
        return checkpoint
    checkpoint = copy.copy(checkpoint)  # with the versions that torch notes on weights
    save_plan(module, checkpoint)
    note_copies(checkpoint, copies_of_callbacks(trainer, module))
    return checkpoint


def _pruning(trainer: "pl.Trainer") -> dict[str, Any]:
    """Return the callbacks that name the result of a run, by the key of their state."""
    return {callback.state_key: callback for callback in pruning_callbacks(trainer)}


def _is_handed_back(checkpoint: dict[str, Any], path: Any) -> bool:
    """Tell whether a file holds the weights that spawned ranks hand back to the parent process."""
    return os.path.basename(str(path)) == _HANDED_BACK and "state_dict" not in checkpoint
