"""What monitors of a Trainer remember of a network that was larger, forgotten when it is pruned.

A score of before a prune is one of another network. What `ModelCheckpoint` calls its best would be outside the budget
to the end of the run; `EarlyStopping` would wait for a score that the smaller network may never reach, and
`ReduceLROnPlateau` would take the learning rate down for want of it.
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from lightning_prune.namesakes import namesakes
from lightning_prune.reporting.loggers import warn

__all__ = ["model_checkpoints", "start_anew", "tell_of_unlogged"]


def model_checkpoints(trainer: "pl.Trainer") -> list[ModelCheckpoint]:
    """Return the callbacks that write checkpoints and name the best and the last one.

    Args:
        trainer: The trainer.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, namesakes(ModelCheckpoint))]


def start_anew(trainer: "pl.Trainer", budget_is_met: bool) -> None:
    """Let monitors forget what they know of the network before a prune; to be called on every rank.

    Args:
        trainer: The trainer.
        budget_is_met: Whether this was the last prune: from then on what is saved as best is within the budget. Files
            that were saved before stay where they are, unless all of a callback's have one name.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, namesakes(EarlyStopping)):
            callback.wait_count = 0
            callback.best_score = _worst(callback.mode)
    for scheduler in _plateaus(trainer):
        scheduler.num_bad_epochs = 0
        scheduler.best = float(_worst(scheduler.mode))
    if budget_is_met:
        for saver in model_checkpoints(trainer):
            if saver.monitor is not None:  # others name what they have saved last
                _forget_best(saver)


def tell_of_unlogged(trainer: "pl.Trainer") -> None:
    """Warn of what `ModelCheckpoint` and `EarlyStopping` go by and nobody has logged; in a trial run they do not.

    Args:
        trainer: The trainer, after a trial run.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, namesakes(ModelCheckpoint, EarlyStopping)) or callback.monitor is None:
            continue
        if callback.monitor not in trainer.callback_metrics:
            names = ", ".join(map(repr, sorted(trainer.callback_metrics)))
            warn(
                f"{type(callback).__name__} goes by {callback.monitor!r}, which has not been logged in this trial run; "
                f"logged were {names}."
            )


def _plateaus(trainer: "pl.Trainer") -> Iterator[ReduceLROnPlateau]:
    """Yield the schedulers that wait for a better score, those that others wrap as well."""
    for config in trainer.lr_scheduler_configs:
        inside = getattr(config.scheduler, "__dict__", {})
        for scheduler in tree_leaves([config.scheduler, list(inside.values())]):
            if isinstance(scheduler, ReduceLROnPlateau):
                yield scheduler


def _forget_best(saver: ModelCheckpoint) -> None:
    """Let a callback begin as it was made, but for the names of files that the next ones take the place of."""
    worst = _worst(saver.mode)
    one_name = saver.filename is not None and "{" not in saver.filename  # "best": who loads that has to get the new one
    files = saver.best_k_models if one_name else {}
    saver.best_k_models = dict.fromkeys(files, worst)
    saver.best_model_path = ""
    saver.best_model_score = None
    saver.current_score = None
    saver.kth_best_model_path = next(iter(files), "")
    saver.kth_value = worst


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)
