"""Carry the plan of a pruned module wherever Lightning carries its weights.

Lightning loads the weights of a checkpoint before any hook of a callback runs, writes checkpoints with weights alone
without asking callbacks, and loads the weights that spawned ranks hand back into a module of the original shape. No
public hook is there at these moments, so the four methods that Lightning runs then are extended here, once: the plan is
saved beside the weights, and the module takes its shape from it before weights are loaded. Modules that were never
pruned are not touched, and it holds for a Trainer without pruning callbacks too.
"""

from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_prune.checkpoint import CHECKPOINT_KEY, restore_shape, save_plan
from lightning_prune.graph.channel_graph import plan_in_force

__all__ = ["carry_plans"]


def carry_plans() -> None:
    """Extend Lightning's checkpoint connector and multi-process launcher to carry plans; done once per process."""
    if not hasattr(_CheckpointConnector, "_carries_plans"):
        _extend_checkpoints()
        _extend_launcher()
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
        if loaded and (CHECKPOINT_KEY in loaded or plan_in_force(module) is not None):
            restore_shape(module, loaded)
        restore(self)

    _CheckpointConnector.dump_checkpoint = dump_checkpoint  # type: ignore[method-assign]
    _CheckpointConnector.restore_model = restore_model  # type: ignore[method-assign]


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
        if CHECKPOINT_KEY in worker_output.extra:
            restore_shape(trainer.lightning_module, worker_output.extra)
        recover(self, worker_output, trainer)

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    _MultiProcessingLauncher._recover_results_in_main_process = recover_results  # type: ignore[method-assign]
