"""The schedule of a pruning callback: before which epochs it prunes, and how much it keeps after each prune."""

from typing import Any

__all__ = ["Schedule", "check_whole_number"]


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
    """

    keep: float
    start_epoch: int
    every_n_epochs: int
    steps: int

    def keep_after(self, step: int) -> float:
        """Return the fraction of the original cost that is kept after a number of prunes."""
        if step >= self.steps:
            return float(self.keep)
        return 1 - (1 - self.keep) * step / self.steps

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
