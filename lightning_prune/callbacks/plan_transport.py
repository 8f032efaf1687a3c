"""Carry the plan of a pruned module wherever Lightning carries its weights.

Lightning loads the weights of a checkpoint before any hook of a callback runs, writes checkpoints with weights alone
without asking callbacks, and loads the weights that spawned ranks hand back into a module of the original shape. No
public hook is there at these moments, so what Lightning runs then is extended here, once: the plan is saved beside the
weights, weights and module are brought to the same shapes before they are loaded, and the module has those of the plan
afterwards. Modules that were never pruned are not touched, and it holds for a Trainer without pruning callbacks and for
``load_from_checkpoint`` too.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core import saving
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_prune.callbacks.trainer_state import averaged_copies
from lightning_prune.checkpoint import (
    CHECKPOINT_KEY,
    fitted,
    refuse_other_shapes,
    restore_shape,
    save_plan,
    saved_plan,
    widened,
)
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery import prune

__all__ = ["carry_plans"]


def carry_plans() -> None:
    """Extend what Lightning saves and loads weights with to carry plans; done once per process."""
    if not hasattr(_CheckpointConnector, "_carries_plans"):
        _extend_checkpoints()
        _extend_launcher()
        _extend_load_from_checkpoint()
        _CheckpointConnector._carries_plans = True  # type: ignore[attr-defined]


def _extend_checkpoints() -> None:
    dump, restore = _CheckpointConnector.dump_checkpoint, _CheckpointConnector.restore_model

    @wraps(dump)
    def dump_checkpoint(self: _CheckpointConnector, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = dump(self, *args, **kwargs)
        save_plan(self.trainer.lightning_module, checkpoint)
        return checkpoint

    @wraps(restore)
    def restore_model(self: _CheckpointConnector) -> None:
        loaded, module = self._loaded_checkpoint, self.trainer.lightning_module
        pruned = CHECKPOINT_KEY in (loaded or {}) or plan_in_force(module) is not None
        if loaded and "state_dict" in loaded and pruned:  # strategies that shard have loaded the weights by now
            for average in averaged_copies(self.trainer):
                restore_shape(average, loaded)
            _restore(module, loaded, partial(restore, self))
        else:
            restore(self)

    _CheckpointConnector.dump_checkpoint = dump_checkpoint  # type: ignore[method-assign]
    _CheckpointConnector.restore_model = restore_model  # type: ignore[method-assign]


def _restore(module: "pl.LightningModule", loaded: dict[str, Any], restore: Callable[[], None]) -> None:
    """Restore a module from weights that fit it, and leave those that fit it afterwards in the loaded checkpoint."""
    plan, weights = saved_plan(loaded), loaded["state_dict"]
    loaded["state_dict"] = fitted(module, loaded)["state_dict"]
    fitting = dict(loaded["state_dict"])
    try:
        restore()
    except RuntimeError:
        refuse_other_shapes(module, loaded["state_dict"])  # says it in fewer words
        raise
    if plan is not None:
        prune(module, plan)
    for name, tensor in weights.items():  # what the module's hook has changed in the checkpoint stays changed
        if loaded["state_dict"].get(name) is fitting[name]:
            loaded["state_dict"][name] = tensor


def _extend_launcher() -> None:
    """Let ranks that are spawned or forked tell the parent process their plan, for it to load their weights."""
    collect = _MultiProcessingLauncher.get_extra_results
    recover = _MultiProcessingLauncher._recover_results_in_main_process

    @wraps(collect)
    def get_extra_results(self: _MultiProcessingLauncher, trainer: "pl.Trainer") -> dict[str, Any]:
        extra = collect(self, trainer)
        save_plan(trainer.lightning_module, extra)
        return extra

    @wraps(recover)
    def recover_results(self: _MultiProcessingLauncher, worker_output: Any, trainer: "pl.Trainer") -> None:
        module = trainer.lightning_module
        pruned = CHECKPOINT_KEY in worker_output.extra or plan_in_force(module) is not None
        if worker_output.weights_path is not None and pruned:
            restore_shape(module, {**worker_output.extra, "state_dict": dict.fromkeys(module.state_dict())})
        recover(self, worker_output, trainer)

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    _MultiProcessingLauncher._recover_results_in_main_process = recover_results  # type: ignore[method-assign]


def _extend_load_from_checkpoint() -> None:
    """Let ``load_from_checkpoint`` make the module in its original shape, as its class expects, and prune it then."""
    load = saving._load_state

    @wraps(load)
    def load_state(cls: type, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plan = saved_plan(checkpoint) if issubclass(cls, pl.LightningModule) else None
        if plan is None:
            return load(cls, checkpoint, *args, **kwargs)
        module = load(cls, widened(checkpoint, plan), *args, **kwargs)
        prune(module, plan)  # type: ignore[arg-type]
        return module

    saving._load_state = load_state
