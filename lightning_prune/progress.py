"""Progress of work that takes long: a bar for each work, on a terminal, from its second second on.

Bars are drawn while work advances and where work begins or ends, by the thread that does it.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import distributed
from tqdm import tqdm

__all__ = ["Bar", "Display", "NoBar", "TqdmDisplay", "Work", "aside", "on_terminal", "progress", "redraw", "show_with"]

SHOWN_AFTER = 1.0  # seconds; work that takes less is not shown


class Work:
    """Some work that is going on.

    Args:
        name: What is being done, as in ``"Tracing ResNet"``.
        total: How many steps it has, if that is known.
        outer: The work that it belongs to, if there is one.
    """

    def __init__(self, name: str, total: int | None = None, outer: "Work | None" = None) -> None:
        self.name = name
        self.total = total
        self.outer = outer
        self.done = 0
        self.note = ""
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the work has taken so far."""
        return time.monotonic() - self.started

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Note that some more steps are done, and draw all bars that are due.

        Args:
            steps: How many.
            note: What to show beside the bar, as in ``"reward 0.93"``; default what is there.
        """
        self.done += steps
        if note is not None:
            self.note = note
        redraw()


class Bar(Protocol):
    """What shows one work to somebody."""

    def update(self, work: Work) -> None:
        """Show how far the work is, if it has taken long enough."""

    def close(self) -> None:
        """Take the bar off the screen."""


class Display(Protocol):
    """Where bars are shown."""

    def bar(self, work: Work) -> Bar:
        """Return a bar for some work that begins."""

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which something else can be written."""


class NoBar:
    """A bar that is not shown."""

    def update(self, work: Work) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class _TqdmBar:
    """A bar of tqdm, which goes below other bars of tqdm that are there."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def update(self, work: Work) -> None:
        form = "{desc}: {elapsed}" if work.total is None else None
        if self._bar is None:
            if work.seconds < SHOWN_AFTER:
                return
            # Not made earlier with tqdm's `delay`: whoever writes between bars would draw it, and it would never go.
            self._bar = tqdm(
                desc=work.name, total=work.total, leave=False, dynamic_ncols=True, miniters=0, bar_format=form
            )
            self._bar.start_t = self._bar.last_print_t = self._bar.start_t - work.seconds
        self._bar.total = work.total
        self._bar.bar_format = form
        self._bar.set_postfix_str(work.note, refresh=False)
        self._bar.update(work.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class TqdmDisplay:
    """Bars of tqdm on standard error."""

    def bar(self, work: Work) -> Bar:
        """Return a bar for some work that begins."""
        return _TqdmBar()

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which something else can be written."""
        return tqdm.external_write_mode(file=sys.stderr)


class _NoDisplay:
    """Shows nothing."""

    def bar(self, work: Work) -> Bar:
        return NoBar()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


_bars: dict[Work, Bar] = {}  # of the work that is going on, outermost first
_chosen: Display | None = None


@contextmanager
def progress(name: str, total: int | None = None) -> Iterator[Work]:
    """Show how far some work is, once it has taken some time; nothing where there is no terminal.

    Work within work has a bar of its own, below that of the other.

    Args:
        name: What is being done, as in ``"Tracing ResNet"``.
        total: How many steps it has, if that is known; it may also be set later, as ``work.total``.

    Example:
        >>> with progress("Adding", total=3) as work:
        ...     for number in range(3):
        ...         work.advance(note=f"at {number}")
        >>> work.done
        3
    """
    work = Work(name, total, outer=next(reversed(_bars), None))
    bar = _bars[work] = _display().bar(work)
    try:
        redraw()
        yield work
    finally:
        del _bars[work]
        bar.close()
        redraw()


def redraw() -> None:
    """Draw all bars that are due; for work that has no steps to count, so that its bar goes on."""
    for work, bar in list(_bars.items()):
        bar.update(work)


@contextmanager
def aside() -> Iterator[None]:
    """Keep bars out of the way while something else is written to the terminal."""
    with _display().aside():
        yield


def show_with(display: Display | None) -> None:
    """Choose where work that begins from now on is shown.

    Args:
        display: The display; None for bars of tqdm, on the first rank, if there is a terminal.
    """
    global _chosen
    _chosen = display


def on_terminal() -> bool:
    """Tell whether somebody looks at a terminal."""
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # None, what stands in for a stream, or a closed one
        return False


def _display() -> Display:
    if _chosen is not None:
        return _chosen
    return TqdmDisplay() if _first_rank() and on_terminal() else _NoDisplay()


def _first_rank() -> bool:
    in_a_group = distributed.is_available() and distributed.is_initialized()
    return not in_a_group or distributed.get_rank() == 0
