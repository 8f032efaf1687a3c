"""The schedule of a pruning callback: before which epochs it prunes, and how much it keeps after each prune."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl

__all__ = ["Schedule", "check_whole_number", "pruning_among", "pruning_callbacks"]

_LEAST = 0.01  # of the original: where nothing bounds it, the metric or rounding has said stop long before


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raise a ValueError unless a setting is a whole number that is large enough.

    Args:
        name: The setting.
        value: What was given.
        least: The least value that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")


class Schedule:
    """Prunes at the start of epochs: the first one before ``start_epoch``, then one every ``every_n_epochs``.

    Attributes:
        keep: Fraction of the original cost that is kept in the end, in (0, 1].
        start_epoch: Number of epochs to train before the first prune, at least 0.
        every_n_epochs: Number of epochs from one prune to the next, at least 1.
        steps: Number of prunes, at least 1.
        max_drop: How far the monitored metric may drop; None where the budget alone says when to stop.
        step_keep: What a prune keeps of what there was before it, where ``max_drop`` says when to stop.
    """

    keep: Any
    start_epoch: int
    every_n_epochs: int
    steps: int
    max_drop: float | None = None
    step_keep: float = 0.9

    def keep_after(self, step: int) -> float:
        """Return the fraction of the original cost that is kept after a number of prunes."""
        if step <= 0:
            return 1.0
        if self.max_drop is not None:
            low, high = self.bounds
            first = high if high < 1 else self.step_keep
            return max(low, first * self.step_keep ** (step - 1))
        if step >= self.steps:
            return float(self.keep)
        return 1 - (1 - self.keep) * step / self.steps

    @property
    def bounds(self) -> tuple[float, float]:
        """The least fraction that may be kept, and the greatest, where ``max_drop`` says when to stop."""
        if self.keep is None:
            return _LEAST, 1.0
        if isinstance(self.keep, list | tuple):
            return self.keep[0], self.keep[-1]
        return self.keep, 1.0

    @property
    def most_steps(self) -> int:
        """Number of prunes that lead to the least fraction, where ``max_drop`` says when to stop."""
        low, high = self.bounds
        first = high if high < 1 else self.step_keep
        if low >= first:
            return 1
        return 1 + math.ceil(math.log(low / first) / math.log(self.step_keep) - 1e-9)

    def steps_due(self, epoch: int) -> int:
        """Return how many prunes come before an epoch, one right before it included."""
        if epoch < self.start_epoch:
            return 0
        epochs_since_first = epoch - self.start_epoch
        return min(self.steps, epochs_since_first // self.every_n_epochs + 1)

    @property
    def last_prune_epoch(self) -> int:
        """The epoch that the last prune comes before."""
        return self.start_epoch + (self.steps - 1) * self.every_n_epochs


def pruning_among(callbacks: Iterable[Any]) -> list[Any]:
    """Return those of some callbacks that prune, in their order: each has a schedule.

    Args:
        callbacks: The callbacks.
    """
    return [callback for callback in callbacks if isinstance(callback, Schedule)]


def pruning_callbacks(trainer: "pl.Trainer") -> list[Any]:
    """Return the pruning callbacks of a trainer, in its order.

    Args:
        trainer: The trainer.
    """
    return pruning_among(trainer.callbacks)  # type: ignore[attr-defined]
