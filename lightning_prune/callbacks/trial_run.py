"""A trial run, by ``fast_dev_run``, goes by what was asked for: it is to find what the run itself would refuse.

Lightning makes one epoch of a few batches of such a run and forgets its number of epochs and its limits, so these are
noted when a Trainer is made.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_prune.namesakes import namesakes

__all__ = ["epochs_of", "forgets", "is_trial", "never_validates", "note_settings", "steps_of"]

_NOTED = "_lightning_prune_settings"


def note_settings(trainer: "pl.Trainer", settings: Mapping[str, Any]) -> None:
    """Note what a Trainer is asked for.

    Args:
        trainer: The trainer.
        settings: What its constructor is given.
    """
    vars(trainer)[_NOTED] = {name: settings.get(name) for name in _NAMES}


_NAMES = ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "overfit_batches")


def is_trial(trainer: "pl.Trainer") -> bool:
    """Tell whether a trainer tries a run out.

    Args:
        trainer: The trainer.
    """
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def forgets(trainer: "pl.Trainer") -> bool:
    """Tell whether a trial run is one of a run that nothing is known of: it was made before anything could be noted.

    Args:
        trainer: The trainer.
    """
    return is_trial(trainer) and _NOTED not in vars(trainer)


def epochs_of(trainer: "pl.Trainer") -> int | None:
    """Return the number of epochs of a run, or of what a trial run is a trial of; None if nothing limits it.

    Args:
        trainer: The trainer.
    """
    epochs = _asked(trainer, "max_epochs") if is_trial(trainer) else trainer.max_epochs
    return None if epochs is None or epochs < 0 else epochs


def never_validates(trainer: "pl.Trainer") -> bool:
    """Tell whether a run, or what a trial run is a trial of, has no validation.

    Args:
        trainer: The trainer.
    """
    if not trainer.enable_validation:
        return True
    turned_off = _asked(trainer, "limit_val_batches") == 0 and not _asked(trainer, "overfit_batches")
    return turned_off and is_trial(trainer)


def steps_of(trainer: "pl.Trainer") -> tuple[int, int] | None:
    """Return how many optimizer steps a run takes at most, or what a trial run is a trial of, and how many an epoch.

    Args:
        trainer: The trainer, which has its training batches.

    Returns:
        None if nothing limits the steps, or it is not known how many an epoch takes.
    """
    steps = _asked(trainer, "max_steps") if is_trial(trainer) else trainer.max_steps
    batches = _training_batches(trainer)
    by_hand = not trainer.lightning_module.automatic_optimization
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    changing = any(isinstance(callback, namesakes(GradientAccumulationScheduler)) for callback in callbacks)
    if steps is None or steps < 0 or batches is None or by_hand or changing:
        return None
    return steps, max(1, -(-batches // trainer.accumulate_grad_batches))


def _training_batches(trainer: "pl.Trainer") -> int | None:
    """Return the number of batches of an epoch, if it is known."""
    batches: Any = trainer.num_training_batches
    if is_trial(trainer):
        batches = _batches_without_trial(trainer)
    return int(batches) if batches != float("inf") else None


def _batches_without_trial(trainer: "pl.Trainer") -> float:
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    limit = _asked(trainer, "limit_train_batches")
    if len(loaders) != 1 or not hasattr(loaders[0], "__len__") or _asked(trainer, "overfit_batches"):
        return float("inf")
    try:
        available = len(loaders[0])
    except TypeError:  # of a stream
        return float("inf")
    if limit is None:
        return available
    return min(limit, available) if isinstance(limit, int) else int(limit * available)


def _asked(trainer: "pl.Trainer", name: str) -> Any:
    return vars(trainer).get(_NOTED, {}).get(name)
