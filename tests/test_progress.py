"""Work that takes long is shown on a terminal, on one line, and what does not is not."""

import io
import os
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext

import pytest

from lightning_prune import progress
from lightning_prune.progress import TqdmBar, Work, aside, on_terminal, show_with


class Screen:
    """A bar that notes what it is to show."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int | None, str]] = []
        self.drawn = threading.Event()
        self.cleared = 0

    def draw(self, name: str, work: Work) -> None:
        self.shown.append((name, work.done, work.total, work.note))
        self.drawn.set()

    def clear(self) -> None:
        self.cleared += 1

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self) -> tuple[str, int, int | None, str]:
        """Return what is shown from now on."""
        for _ in range(2):  # the first may have begun before
            self.drawn.clear()
            assert self.drawn.wait(30)
        return self.shown[-1]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    made = Screen()
    show_with(made)
    yield made
    show_with(None)


def test_how_far_work_is_shows_while_it_lasts(screen: Screen) -> None:
    with progress.progress("Adding", total=3) as work:
        assert screen.wait() == ("Adding", 0, 3, "")
        work.advance(2, note="reward 0.5")
        work.advance()
        assert screen.wait() == ("Adding", 3, 3, "reward 0.5")
    assert screen.cleared == 1
    count = len(screen.shown)
    screen.drawn.clear()
    assert not screen.drawn.wait(0.1)
    assert len(screen.shown) == count


def test_one_line_tells_of_the_outermost_work_whose_end_is_in_sight(screen: Screen) -> None:
    with progress.progress("Pruning") as outer:
        assert screen.wait()[:3] == ("Pruning", 0, None)
        with progress.progress("layer", total=5) as middle:
            middle.advance()
            with progress.progress("Measuring", total=9):
                assert screen.wait() == ("Pruning: layer", 1, 5, "")
        with progress.progress("Measuring") as inner:
            assert screen.wait() == ("Pruning: Measuring", 0, None, "")
            inner.total = 7
            assert screen.wait() == ("Pruning: Measuring", 0, 7, "")
        outer.advance()
        assert screen.wait() == ("Pruning", 1, None, "")
    assert screen.cleared == 1


def test_short_work_is_not_shown_whether_it_succeeds_or_fails(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60)
    before = set(threading.enumerate())
    with progress.progress("Adding"):
        pass
    with pytest.raises(ValueError, match="no number"), progress.progress("Adding"):
        raise ValueError("no number")
    assert set(threading.enumerate()) == before  # nobody waits for the minute to pass
    assert screen.shown == []


def test_threads_share_one_line_and_leave_none_behind(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(threading.Thread):
        def start(self) -> None:
            time.sleep(0.01)  # time for others to begin
            super().start()

    monkeypatch.setattr(progress, "Thread", Slow)
    before, together = set(threading.enumerate()), threading.Barrier(4)

    def work() -> None:
        together.wait(30)
        with progress.progress("Adding"):
            together.wait(30)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(threading.enumerate()) == before
    assert screen.cleared == 1


def test_work_that_is_interrupted_as_it_begins_is_over(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    monkeypatch.setattr(progress, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt), progress.progress("Adding"):
        pass
    assert progress._screen.works == []
    assert set(threading.enumerate()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_bar_is_drawn_can_write(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, forked = threading.Event(), threading.Event()

    def draw(name: str, work: Work) -> None:
        drawing.set()
        forked.wait(0.2)

    monkeypatch.setattr(screen, "draw", draw)
    with progress.progress("Adding"):
        assert drawing.wait(30)
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # it would wait for ever
            with aside():
                os._exit(0)
        forked.set()
        assert os.waitpid(child, 0)[1] == 0


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tqdm_draws_parts_time_left_and_note_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    assert on_terminal()
    bar, work = TqdmBar(), Work("Timing", total=4)
    work.advance(note="reward 0.5")
    bar.draw("Pruning: Timing", work)
    line = stream.getvalue().split("\r")[-1]
    assert line.startswith("Pruning: Timing:  25%")
    assert "1/4 [" in line
    assert "reward 0.5" in line
    work.total = None
    bar.draw("Tracing", work)
    assert stream.getvalue().split("\r")[-1].rstrip() == "Tracing: 00:00"
    with bar.aside():
        assert stream.getvalue().split("\r")[-1].strip() == ""  # the line is free
    assert stream.getvalue().split("\r")[-1].rstrip() == "Tracing: 00:00"
    bar.draw("Adding", Work("Adding", total=2))  # begun after the bar
    assert stream.getvalue().split("\r")[-1].startswith("Adding:   0%")
    bar.clear()
    assert stream.getvalue().split("\r")[-1].strip() == ""


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
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_TICK", 0.001)
    monkeypatch.setattr("sys.stderr", stream)
    looked = threading.Event()
    monkeypatch.setattr(progress._NoBar, "draw", lambda self, name, work: looked.set())
    with progress.progress("Adding", 3) as work, aside():
        work.advance()
    with progress.progress("Adding", 3):
        assert looked.wait(30)
    assert (stream.getvalue() if stream else "") == ""
    assert capsys.readouterr().out == ""


def test_ranks_but_the_first_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(progress._bar_here(), TqdmBar)
    monkeypatch.setattr(progress.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(progress.distributed, "get_rank", lambda: 1)
    assert not isinstance(progress._bar_here(), TqdmBar)
