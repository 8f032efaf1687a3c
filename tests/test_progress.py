"""Work that takes long is shown on a terminal, each in a bar of its own, and what does not is not."""

import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
from tqdm import tqdm

from lightning_prune import progress
from lightning_prune.progress import Bar, TqdmDisplay, Work, aside, on_terminal, redraw, show_with


class Screen:
    """A display that notes what it is to show."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int | None, str]] = []
        self.open: list[str] = []

    def bar(self, work: Work) -> Bar:
        return ScreenBar(self, work.name)

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def drawn(self) -> list[tuple[str, int, int | None, str]]:
        """Return what has been shown since the last call."""
        drawn, self.shown = self.shown, []
        return drawn


class ScreenBar:
    def __init__(self, screen: Screen, name: str) -> None:
        self.screen, self.name = screen, name
        screen.open.append(name)

    def update(self, work: Work) -> None:
        if work.seconds >= progress.SHOWN_AFTER:
            self.screen.shown.append((work.name, work.done, work.total, work.note))

    def close(self) -> None:
        self.screen.open.remove(self.name)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    made = Screen()
    show_with(made)
    yield made
    show_with(None)


def test_how_far_work_is_shows_while_it_lasts(screen: Screen) -> None:
    with progress.progress("Adding", total=3) as work:
        assert screen.drawn() == [("Adding", 0, 3, "")]
        work.advance(2, note="reward 0.5")
        assert screen.drawn() == [("Adding", 2, 3, "reward 0.5")]
        work.advance()
        assert screen.drawn() == [("Adding", 3, 3, "reward 0.5")]  # the note is as before
        redraw()
        assert screen.drawn() == [("Adding", 3, 3, "reward 0.5")]
    assert screen.open == []
    redraw()
    assert screen.drawn() == []


def test_work_within_work_has_a_bar_below_and_keeps_the_others_going(screen: Screen) -> None:
    with progress.progress("Pruning") as outer:
        assert screen.drawn() == [("Pruning", 0, None, "")]
        with progress.progress("layer", total=5) as middle:
            screen.drawn()
            middle.advance()
            assert screen.drawn() == [("Pruning", 0, None, ""), ("layer", 1, 5, "")]
            with progress.progress("Measuring", total=9):
                assert screen.open == ["Pruning", "layer", "Measuring"]
        assert screen.open == ["Pruning"]
        with progress.progress("Measuring") as inner:
            screen.drawn()
            inner.total = 7
            outer.advance()
            assert screen.drawn() == [("Pruning", 1, None, ""), ("Measuring", 0, 7, "")]
    assert screen.open == []


def test_short_work_is_not_shown_whether_it_succeeds_or_fails(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 60)
    with progress.progress("Adding") as work:
        work.advance()
    with pytest.raises(ValueError, match="no number"), progress.progress("Adding"):
        raise ValueError("no number")
    assert screen.shown == []
    assert screen.open == []


def test_threads_have_bars_of_their_own_and_leave_none_behind(screen: Screen) -> None:
    before, together = set(threading.enumerate()), threading.Barrier(4)

    def work(name: str) -> None:
        together.wait(30)
        with progress.progress(name) as work:
            work.advance()
            together.wait(30)

    threads = [threading.Thread(target=work, args=[f"Adding {number}"]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(threading.enumerate()) == before
    assert {name for name, *_ in screen.shown} == {f"Adding {number}" for number in range(4)}
    assert screen.open == []


def test_work_that_is_interrupted_as_it_begins_is_over(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bar: ScreenBar, work: Work) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScreenBar, "update", interrupted)
        with pytest.raises(KeyboardInterrupt), progress.progress("Adding"):
            pass
    assert progress._bars == {}
    assert screen.open == []
    with progress.progress("Adding"):
        assert screen.drawn() == [("Adding", 0, None, "")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_process_that_is_forked_while_work_goes_on_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch)
    with progress.progress("Adding", total=2) as work:
        work.advance()
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # it would wait for ever
            with aside():
                pass
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Return the lines as somebody sees them now; bars of tqdm move up and down with the cursor."""
        rows, row, column = [""], 0, 0
        for text in re.findall("\x1b\\[A|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if text == "\r":
                column = 0
            elif text in ("\n", "\x1b[A"):
                row += 1 if text == "\n" else -1
                rows += [""] * (row + 1 - len(rows))
            else:
                rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
                column += len(text)
        return [line.rstrip() for line in rows if line.strip()]


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return a terminal on which work is shown at once."""
    terminal = Terminal()
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr", terminal)  # in a fixture, pytest would set it again
    return terminal


def later(work: Work) -> None:
    """Let tqdm draw again: so much time has passed."""
    for bar in tqdm._instances:
        bar.last_print_t -= 1
    work.advance(0)


def test_tqdm_draws_steps_time_left_and_note_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    assert on_terminal()
    with progress.progress("Timing", total=4) as work:
        assert terminal.lines()[0].startswith("Timing:   0%")
        work.advance(note="reward 0.5")
        later(work)
        (line,) = terminal.lines()
        assert line.startswith("Timing:  25%")
        assert "1/4 [" in line
        assert "reward 0.5" in line
        with progress.progress("Tracing") as inner:
            assert terminal.lines()[1] == "Tracing: 00:00"
            inner.started -= 5
            with aside():
                assert terminal.lines() == []  # the lines are free
            assert terminal.lines()[0].startswith("Timing:  25%")
            assert terminal.lines()[1] == "Tracing: 00:00"
            inner.total = 2
            inner.advance()
            later(inner)
            assert terminal.lines()[1].startswith("Tracing:  50%")
        assert len(terminal.lines()) == 1
    assert terminal.lines() == []


def test_tqdm_counts_the_time_before_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 60)
    with progress.progress("Adding", total=8) as work:
        work.advance(2)
        with aside():
            print("a line", file=terminal)
        assert terminal.lines() == ["a line"]  # who writes in between does not draw the bar
        work.started -= 80
        work.advance(2)
        assert terminal.lines()[1].startswith("Adding:  50%")
        assert "4/8 [01:20<01:20" in terminal.lines()[1]
    assert terminal.lines() == ["a line"]


def test_what_stands_in_for_the_terminal_need_not_be_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, object()):
        monkeypatch.setattr("sys.stderr", stream)
        assert not on_terminal()


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_without_a_terminal_nothing_is_written(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress("Adding", 3) as work, aside():
        work.advance()
    assert (stream.getvalue() if stream else "") == ""
    assert capsys.readouterr().out == ""


def test_no_thread_draws_but_that_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch)
    before = set(threading.enumerate())
    with progress.progress("Adding", total=2) as work:
        work.advance()
        started = set(threading.enumerate()) - before
    assert [thread for thread in started if not type(thread).__module__.startswith("tqdm")] == []


def test_ranks_but_the_first_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watched(monkeypatch)
    assert isinstance(progress._display(), TqdmDisplay)
    monkeypatch.setattr(progress.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(progress.distributed, "get_rank", lambda: 1)
    assert not isinstance(progress._display(), TqdmDisplay)
    with progress.progress("Adding", total=2) as work:
        work.advance()
    assert terminal.getvalue() == ""
