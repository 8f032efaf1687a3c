"""Progress as the Trainer shows it: a bar like its own on a terminal, one line elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_prune.progress import TqdmBar, Work, aside, on_terminal, show_with

__all__ = ["follow", "say", "warn"]


class _Line:
    """A line about each piece of work, and no bar."""

    def __init__(self) -> None:
        self._told = False

    def draw(self, name: str, work: Work) -> None:
        if not self._told:
            rank_zero_info(f"{name} ...")
        self._told = True

    def clear(self) -> None:
        self._told = False

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


class _RichBar:
    """A bar of rich, in the place of the Trainer's own for a while: rich draws one at a time."""

    def __init__(self, owner: RichProgressBar) -> None:
        self._owner = owner
        self._drawn: Any = None
        self._under: Any = None  # the Trainer's own, while it is hidden
        self._work: Work | None = None

    def draw(self, name: str, work: Work) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._drawn is None:
            self._under = _hide(self._owner.progress)
            self._drawn = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[parts]}"), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._owner._console, transient=True,
            )  # fmt: skip
            self._drawn.start()
        if self._work is not work:
            for task in self._drawn.task_ids:
                self._drawn.remove_task(task)
            self._work, self._task = work, self._drawn.add_task(name, total=work.total, parts="", note="")
        parts = "" if work.total is None else f"{work.done}/{work.total}"
        self._drawn.update(self._task, completed=work.done, total=work.total, parts=parts, note=work.note)

    def clear(self) -> None:
        if self._drawn is not None:
            _hide(self._drawn)
            self._drawn = self._work = None
            _show(self._under)

    @contextmanager
    def aside(self) -> Iterator[None]:
        hidden = _hide(self._drawn or self._owner.progress)
        try:
            yield
        finally:
            _show(hidden)


def _hide(drawn: Any) -> Any:
    """Take what rich draws off the screen; returns it if it was there."""
    if drawn is None or not drawn.live.is_started:
        return None
    before, drawn.live.transient = drawn.live.transient, True
    drawn.stop()
    drawn.live.transient = before
    return drawn


def _show(hidden: Any) -> None:
    if hidden is not None:
        hidden.start()


def follow(trainer: "pl.Trainer") -> None:
    """Show work as a Trainer shows epochs, until `lightning_prune.progress.show_with` says otherwise.

    Args:
        trainer: The trainer. With a bar of its own, and on a terminal, there is a bar of the same kind; otherwise
            there is a line about each piece of work that takes long. Only the first rank shows anything.
    """
    bar = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero or not on_terminal():
        show_with(_Line())  # which the other ranks do not log
    else:
        show_with(_RichBar(bar) if isinstance(bar, RichProgressBar) else TqdmBar())


def say(text: str) -> None:
    """Log a message, from the first rank, without a bar in its way."""
    with aside():
        rank_zero_info(text)


def warn(text: str) -> None:
    """Warn, from the first rank, without a bar in the way."""
    with aside():
        rank_zero_warn(text)
