"""How far along some long work is: a bar on a terminal."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, RLock, Thread
from typing import Any, Protocol

from torch import distributed
from tqdm import tqdm

__all__ = ["Bar", "TqdmBar", "Work", "aside", "on_terminal", "progress", "show_with"]

QUIET_SECONDS = 1.0  # work that takes less is not shown
_TICK = 0.2  # seconds from one look at the work to the next


class Work:
    """Some work that is going on.

    Args:
        name: What is being done, as in ``"Tracing ResNet"``.
        total: How many parts it has, if that is known.
    """

    def __init__(self, name: str, total: int | None = None) -> None:
        self.name, self.total = name, total
        self.done = 0
        self.note = ""
        self.started = time.monotonic()

    def advance(self, parts: int = 1, note: str | None = None) -> None:
        """Note that some more parts are done; nothing is drawn here, so that it costs nothing.

        Args:
            parts: How many.
            note: What to show beside the bar, as in ``"reward 0.93"``; default what is there.
        """
        self.done += parts
        self.note = self.note if note is None else note


class Bar(Protocol):
    """What shows work to somebody."""

    def draw(self, name: str, work: Work) -> None:
        """Show how far work is, under a name."""

    def clear(self) -> None:
        """Leave the screen as it was before the first `draw`."""

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which something else can be written."""


class TqdmBar:
    """A bar of tqdm, which goes below other bars of tqdm that are there."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def draw(self, name: str, work: Work) -> None:
        """Show how far work is, under a name."""
        if self._bar is None:
            self._bar = tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, bar_format="{desc}")
        bar = self._bar
        bar.bar_format = "{desc}: {elapsed}" if work.total is None else None
        bar.total, bar.n, bar.desc, bar.postfix = work.total, work.done, name, work.note
        bar.last_print_t = bar._time()  # a bar that was drawn before it started would stay
        bar.start_t = bar.last_print_t - (time.monotonic() - work.started)
        bar.refresh()

    def clear(self) -> None:
        """Leave the screen as it was before the first `draw`."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which something else can be written."""
        return tqdm.external_write_mode(file=sys.stderr)


class _NoBar:
    """Shows nothing."""

    def draw(self, name: str, work: Work) -> None: ...

    def clear(self) -> None: ...

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


def on_terminal() -> bool:
    """Tell whether somebody looks at a terminal."""
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # None, what stands in for a stream, or a closed one
        return False


def _bar_here() -> Bar:
    """Return a bar where nobody has said what to show work with."""
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    return TqdmBar() if first and on_terminal() else _NoBar()


class _Screen:
    """What is going on in this process, outermost first, and who shows it; several threads may work at once."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.chosen: Bar | None = None
        self.bar: Bar = _NoBar()
        self.lock = RLock()
        self.over = Event()
        self.watcher: Thread | None = None

    def enter(self, work: Work) -> None:
        with self.lock:
            self.works.append(work)
            if self.watcher is None:
                self.bar, self.over = self.chosen or _bar_here(), Event()
                self.watcher = Thread(target=self._watch, args=(self.over,), daemon=True)
                self.watcher.start()

    def leave(self, work: Work) -> None:
        with self.lock:
            self.works = [other for other in self.works if other is not work]
            if self.works or self.watcher is None:
                return
            watcher, self.watcher = self.watcher, None
            self.over.set()
            self.bar.clear()
        if watcher.is_alive():  # not in a process that was forked in the meantime
            watcher.join()

    def _watch(self, over: Event) -> None:
        pause = QUIET_SECONDS
        while not over.wait(pause):
            pause = _TICK
            with self.lock:
                if not over.is_set():
                    self._draw()

    def _draw(self) -> None:
        """Show one line: the outermost work whose end is in sight, with what it is a part of."""
        works = self.works
        counted = next((number for number, work in enumerate(works) if work.total is not None), len(works) - 1)
        self.bar.draw(": ".join(work.name for work in works[: counted + 1]), works[counted])


_screen = _Screen()
if hasattr(os, "register_at_fork"):  # not on Windows
    # Workers that are forked in the middle of a drawing would get locks that nobody gives back.
    _release = _screen.lock.release
    os.register_at_fork(before=_screen.lock.acquire, after_in_parent=_release, after_in_child=_release)


@contextmanager
def progress(name: str, total: int | None = None) -> Iterator[Work]:
    """Show how far some work is, once it has taken some time; nothing where there is no terminal.

    Work within work shows on the same line.

    Args:
        name: What is being done, as in ``"Tracing ResNet"``.
        total: How many parts it has, if that is known; it may also be set later, as ``work.total``.

    Example:
        >>> with progress("Adding", total=3) as work:
        ...     for number in range(3):
        ...         work.advance(note=f"at {number}")
        >>> work.done
        3
    """
    work = Work(name, total)
    try:
        _screen.enter(work)
        yield work
    finally:
        _screen.leave(work)


@contextmanager
def aside() -> Iterator[None]:
    """Keep bars out of the way while something else is written to the terminal."""
    with _screen.lock:
        bar = _screen.bar if _screen.watcher is not None else _screen.chosen or _bar_here()
        with bar.aside():
            yield


def show_with(bar: Bar | None) -> None:
    """Choose what shows work from now on.

    Args:
        bar: The bar; None for one of tqdm, on the first rank, if there is a terminal.
    """
    _screen.chosen = bar
