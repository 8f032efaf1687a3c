"""Bars of the Trainer's kind for work in callbacks: of rich or of tqdm on a terminal, one line elsewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_prune import progress
from lightning_prune.namesakes import namesakes
from lightning_prune.progress import Bar, Display, NoBar, TqdmDisplay, Work, on_terminal, show_with

__all__ = ["follow"]


def follow(trainer: "pl.Trainer") -> None:
    """Show work as a Trainer shows epochs, until `lightning_prune.progress.show_with` says otherwise.

    Args:
        trainer: The trainer. With a bar of its own, and on a terminal, there are bars of the same kind; otherwise there
            is a line about work that takes long. Only the first rank shows anything.
    """
    show_with(_display(trainer))


def _display(trainer: "pl.Trainer") -> Display:
    epochs = trainer.progress_bar_callback
    disabled = epochs is None or getattr(epochs, "is_disabled", False)
    if disabled or not trainer.is_global_zero or not on_terminal():
        return _LogDisplay()  # other ranks than the first do not log
    return _RichDisplay(epochs) if isinstance(epochs, namesakes(RichProgressBar)) else TqdmDisplay()


class _LogDisplay:
    """A line in the log about work that takes long, and none about work within it."""

    def bar(self, work: Work) -> Bar:
        return _LogLine() if work.outer is None else NoBar()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


class _LogLine:
    def __init__(self) -> None:
        self._logged = False

    def update(self, work: Work) -> None:
        if not self._logged and work.seconds >= progress.SHOWN_AFTER:
            self._logged = True
            rank_zero_info(f"{work.name} ...")

    def close(self) -> None: ...


class _RichDisplay:
    """Rows in the Trainer's own display of rich, which draws one display at a time; bars of tqdm while it has none."""

    def __init__(self, epochs: RichProgressBar) -> None:
        self._epochs = epochs
        self._otherwise = TqdmDisplay()

    def bar(self, work: Work) -> Bar:
        running = self._running()
        return self._otherwise.bar(work) if running is None else _RichRow(self._epochs, running, work)

    @contextmanager
    def aside(self) -> Iterator[None]:
        running = self._running()
        with self._otherwise.aside():
            if running is None:
                yield
            else:
                with _hidden(running):
                    yield

    def _running(self) -> Any:
        """Return the Trainer's display if it is on the screen."""
        display = self._epochs.progress
        return display if display is not None and display.live.is_started else None


class _RichRow:
    def __init__(self, epochs: RichProgressBar, display: Any, work: Work) -> None:
        self._epochs = epochs
        self._display = display
        self._row = display.add_task(work.name, total=_total(work), visible=False)

    def update(self, work: Work) -> None:
        if work.seconds >= progress.SHOWN_AFTER:
            told = f"{work.name} ({work.note})" if work.note else work.name
            self._display.update(self._row, description=told, completed=work.done, total=_total(work), visible=True)
            self._epochs.refresh()

    def close(self) -> None:
        self._display.remove_task(self._row)
        self._epochs.refresh()


def _total(work: Work) -> float:
    return float("inf") if work.total is None else work.total  # as the columns of the Trainer want it


@contextmanager
def _hidden(display: Any) -> Iterator[None]:
    """Take what rich draws off the screen for a while."""
    before = display.live.transient
    display.live.transient = True
    display.stop()
    display.live.transient = before
    try:
        yield
    finally:
        display.start()
