"""The file that holds the result of a run: the plan in force and the weights in memory, whatever else is saved.

It is found among the files that `ModelCheckpoint` callbacks name, or written beside them. What is named has been read.
"""

import os
from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune.callbacks.monitors import model_checkpoints
from lightning_prune.callbacks.plan_checkpoint_io import read_back
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.checkpoint import saved_plan
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.loggers import run_folder, warn

__all__ = ["found_result", "interrupted_result", "named_result", "try_result"]

_NAME = "pruned"


def found_result(trainer: "pl.Trainer", known: Iterable[str] = ()) -> str:
    """Return the path of a file with the plan in force and the weights in memory, or ""; to be called on all ranks.

    Args:
        trainer: The trainer.
        known: Files besides those that ModelCheckpoints name.
    """
    return decided_by_first_rank(trainer, lambda: _found(trainer, known))


def named_result(trainer: "pl.Trainer", known: Iterable[str], budget_is_met: bool) -> str:
    """Return the path of a file with the plan in force and the weights in memory; to be called on all ranks.

    It is written if there is none. What ModelCheckpoints name as their last file, and as their best one within the
    budget, is a file of the pruned network afterwards.

    Args:
        trainer: The trainer, at the end of training.
        known: Files besides those that ModelCheckpoints name.
        budget_is_met: Whether all prunes have been made.

    Returns:
        The path, or "" if no file could be written, of which a warning says why.
    """
    for saver in _outdated(trainer, "last_model_path"):
        _write(trainer, saver.last_model_path, saver.save_weights_only)
    path = found_result(trainer, known)
    if not path:
        path = decided_by_first_rank(trainer, lambda: _free_path(trainer))
        path = _checked(trainer, path, _write(trainer, path))
    if budget_is_met:
        for saver in _outdated(trainer, "best_model_path"):
            saver.best_model_path = path  # the only file within the budget is the best one
    return path


def try_result(trainer: "pl.Trainer") -> None:
    """Warn if the result could not be written, or read back; nothing is left of it. To be called on all ranks.

    Args:
        trainer: The trainer, after a trial run.
    """
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{_NAME}.ckpt")
        _checked(trainer, path, _write(trainer, path))


def interrupted_result(trainer: "pl.Trainer") -> str:
    """Write the result of a run that was interrupted, on the first rank: the others may not be there to be asked.

    Args:
        trainer: The trainer.

    Returns:
        The path, or "" on other ranks and if no file could be written, of which a warning says why.
    """
    if not trainer.is_global_zero:
        return ""
    path = _free_path(trainer)
    failure = ""
    try:
        # What all ranks remember, optimizers and loaders among it, is saved where this is all of them.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=trainer.world_size > 1)
        trainer.strategy.save_checkpoint(checkpoint, path)
        trainer.strategy.checkpoint_io.teardown()
    except Exception as raised:
        failure = _told(raised)
    return path if not failure and _holds(trainer, path) else _say_it_failed(path, failure)


# -- files that are there ----------------------------------------------------------------------------------------------


def _found(trainer: "pl.Trainer", known: Iterable[str]) -> str:
    """Return the first file that holds the result, or ""."""
    paths = dict.fromkeys([*known, *_named_files(trainer)])
    holding = (path for path in paths if path and _holds(trainer, path))
    return next(holding, "")


def _named_files(trainer: "pl.Trainer") -> Iterator[str]:
    """Yield what ModelCheckpoints name, those first that are likely to have been written last."""
    savers = model_checkpoints(trainer)
    yield from (saver.last_model_path for saver in savers)
    yield from (saver.best_model_path for saver in savers)
    for saver in savers:
        yield from reversed(saver.best_k_models)


def _outdated(trainer: "pl.Trainer", name: str) -> list[ModelCheckpoint]:
    """Return the ModelCheckpoints one of whose files is not one of the pruned network; to be called on all ranks.

    Args:
        trainer: The trainer.
        name: Where they name the file: as the last one, or as the best one. That is left alone if it is the best by a
            metric, which is for the setting of the pruning callback to forget; one that was forgotten is outdated.
    """
    savers = model_checkpoints(trainer)
    if name == "best_model_path":
        savers = [saver for saver in savers if saver.save_top_k != 0]
        savers = [saver for saver in savers if saver.monitor is None or not saver.best_model_path]
    else:
        savers = [saver for saver in savers if saver.last_model_path]

    def places() -> list[int]:
        return [place for place, saver in enumerate(savers) if not _has_plan(trainer, getattr(saver, name))]

    return [savers[place] for place in decided_by_first_rank(trainer, places)]


def _has_plan(trainer: "pl.Trainer", path: str) -> bool:
    """Tell whether a file is one of the network as it is pruned now."""
    content = _read(trainer, path)
    return bool(content) and saved_plan(content) == plan_in_force(trainer.lightning_module)


def _holds(trainer: "pl.Trainer", path: str) -> bool:
    """Tell whether a file has the plan in force and the weights in memory."""
    content = _read(trainer, path)
    module = trainer.lightning_module
    if not content or saved_plan(content) != plan_in_force(module):
        return False
    saved = content["state_dict"], content.get("current_model_state", {})  # an average and what it is one of
    return any(_same_weights(weights, module) for weights in saved)


def _read(trainer: "pl.Trainer", path: str) -> dict[str, Any]:
    """Return what a checkpoint holds; nothing if there is no file, or none that can be read."""
    try:
        content = read_back(trainer, path)
        saved_plan(content)
    except Exception:  # whatever a file that is damaged, or of another kind, makes of whatever reads it
        return {}
    return content if isinstance(content.get("state_dict"), dict) else {}


def _same_weights(saved: dict[str, Any], module: nn.Module) -> bool:
    """Tell whether weights are those of a module, as far as the module has let them be saved."""
    own = module.state_dict()
    pairs = [(saved[name], own[name]) for name in saved.keys() & own.keys() if isinstance(own[name], Tensor)]
    return bool(pairs) and all(_same(one, other) for one, other in pairs)


def _same(one: Any, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    one = one.cpu()
    other = other.detach().cpu().to(one.dtype)  # some save half the bits
    return bool(torch.where(one.isnan(), other.isnan(), one == other).all())


# -- a file of ours ----------------------------------------------------------------------------------------------------


def _free_path(trainer: "pl.Trainer") -> str:
    """Return a path in the folder of the checkpoints at which there is no file."""
    folder = _folder(trainer)
    files = get_filesystem(folder)
    path = os.path.join(folder, f"{_NAME}.ckpt")
    version = 0
    while files.exists(path):
        version += 1
        path = os.path.join(folder, f"{_NAME}-v{version}.ckpt")
    return path


def _folder(trainer: "pl.Trainer") -> str:
    for saver in model_checkpoints(trainer):
        if saver.dirpath:
            return str(saver.dirpath)
    return os.path.join(run_folder(trainer) or trainer.default_root_dir, "checkpoints")  # as Lightning has it


def _write(trainer: "pl.Trainer", path: str, weights_only: bool = False) -> str:
    """Write a checkpoint; to be called on all ranks.

    Returns:
        What has failed, in words, or "".
    """
    failure = ""
    try:
        trainer.save_checkpoint(path, weights_only)
    except Exception as raised:  # whatever a full disk or a hook makes of it: the network is in memory still
        trainer.strategy.barrier()  # where the other ranks wait
        failure = _told(raised)
    try:
        trainer.strategy.checkpoint_io.teardown()  # waits for what is written in another thread
    except Exception as raised:
        failure = _told(raised)
    return failure


def _checked(trainer: "pl.Trainer", path: str, failure: str) -> str:
    """Return the path if all is there that the file has to hold, else "", with a warning; to be called on all ranks."""
    holds = decided_by_first_rank(trainer, lambda: not failure and _holds(trainer, path))
    return path if holds else _say_it_failed(path, failure)


def _say_it_failed(path: str, failure: str) -> str:
    why = failure or "what was read back is not what is in memory"
    warn(
        f"The pruned network could not be written to {path!r} ({why}); it is in memory still: save it with "
        "trainer.save_checkpoint."
    )
    return ""


def _told(raised: Exception) -> str:
    return str(raised) or type(raised).__name__
