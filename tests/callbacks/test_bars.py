"""Progress during `fit`: bars of the Trainer's kind on a terminal, a line elsewhere, nothing in each other's way."""

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import battery
import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor

from lightning_prune import progress
from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.bars import follow
from lightning_prune.reporting.loggers import say


class Terminal:
    """A pseudo-terminal of 40 rows and 100 columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = ""
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w")
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        monkeypatch.setenv("TERM", "xterm")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # at the end
            while True:
                self.text += os.read(self.master, 65536).decode(errors="replace")

    def wait_for(self, text: str, start: int = 0) -> None:
        """Wait until a text is on the terminal."""
        until = time.monotonic() + 30
        while text not in self.text[start:]:
            assert time.monotonic() < until, (text, self.text)
            time.sleep(0.005)

    def lines(self) -> list[str]:
        """Return the lines as somebody sees them in the end; bars move up and down with the cursor."""
        self.stream.write("#end")
        self.stream.flush()
        self.wait_for("#end")
        rows, row, column, rest = [""], 0, 0, self.text
        while rest:
            if rest[0] == "\r":
                column, rest = 0, rest[1:]
            elif rest[0] == "\n":
                row, rest = row + 1, rest[1:]
                rows += [""] * (row + 1 - len(rows))
            elif rest.startswith("\x1b["):
                end = next(at for at in range(2, len(rest)) if rest[at].isalpha())
                code, number = rest[end], rest[2:end]
                row -= int(number or 1) if code == "A" else 0
                if code == "K":
                    rows[row] = "" if number == "2" else rows[row][:column]
                rest = rest[end + 1 :]
            else:
                rows[row] = rows[row][:column].ljust(column) + rest[0] + rows[row][column + 1 :]
                column, rest = column + 1, rest[1:]
        return [line.rstrip() for line in rows if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    made = Terminal(monkeypatch)
    # Lightning's logger holds on to the stream that it was made with.
    monkeypatch.setattr("lightning_prune.reporting.loggers.rank_zero_info", lambda text: print(text, file=sys.stderr))
    yield made
    progress.show_with(None)
    made.stream.close()
    os.close(made.master)


class SlowCallback(PruningCallback):
    """Ranks only when its bar has been seen."""

    terminal: Terminal

    def scores(self, trainer: L.Trainer, graph: Any) -> dict[str, Tensor]:
        start = len(self.terminal.text)
        with progress.progress("ranking", total=8) as work:
            time.sleep(0.15)  # tqdm draws no more often than that
            work.advance(2, note="reward 0.5")
            self.terminal.wait_for("2/8", start)
            self.terminal.wait_for("reward 0.5", start)
        return super().scores(trainer, graph)


def fit(root: Path, terminal: Terminal, bar: L.Callback) -> list[str]:
    """Prune in three steps; returns what is on the terminal then."""
    callback = SlowCallback(keep=0.5, steps=3, round_to=2)
    callback.terminal = terminal
    with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
        battery.train(root, callback, bar, enable_progress_bar=True)
    return terminal.lines()


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_bars_are_of_the_trainers_kind_and_leave_only_the_messages(
    kind: str, tmp_path: Path, terminal: Terminal
) -> None:
    if kind == "rich":
        pytest.importorskip("rich")
    lines = fit(tmp_path, terminal, {"tqdm": TQDMProgressBar, "rich": RichProgressBar}[kind]())
    shown = terminal.text[terminal.text.index("Pruning ResidualClassifier, step 2 of 3") :][:1500]
    assert "ranking" in shown
    assert ("ranking:  25%|" in shown) == (kind == "tqdm")
    assert not any("ranking" in line or "Pruning" in line for line in lines)  # taken away again
    for step, epoch in ((1, 1), (2, 2), (3, 3)):
        assert any(line.startswith(f"Prune {step} of 3 before epoch {epoch}: ") for line in lines), lines
    assert sum(line.startswith("parameters: ") for line in lines) == 3
    assert sum(line.lstrip().startswith("val/accuracy  ") for line in lines) == 1
    assert [line for line in lines if line.startswith("Epoch")][-1].count("Epoch") == 1


def test_a_trainer_without_a_bar_and_one_without_a_terminal_get_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_prune.callbacks.bars.rank_zero_info", said.append)
    monkeypatch.setattr("lightning_prune.reporting.loggers.rank_zero_info", said.append)
    for shows in (True, False):
        bars = [TQDMProgressBar()] if shows else []
        trainer = L.Trainer(enable_progress_bar=shows, callbacks=bars, logger=False, accelerator="cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_prune.callbacks.bars.on_terminal", lambda shows=shows: not shows)
            follow(trainer)
        for _ in range(2):
            with progress.progress("Tracing") as outer, progress.progress("step", total=3) as work:
                work.advance()
                assert "Tracing ..." not in said  # not before it has taken a second
                outer.started = work.started = time.monotonic() - 1
                for _ in range(2):
                    work.advance()
            assert said == ["Tracing ..."]
            said.clear()
    say("done")
    progress.show_with(None)
    assert said == ["done"]


def test_ranks_but_the_first_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.callbacks.bars.on_terminal", lambda: True)
    for first in (True, False):  # the Trainer's bars are disabled only later
        follow(SimpleNamespace(progress_bar_callback=TQDMProgressBar(), is_global_zero=first))
        assert isinstance(progress._display(), progress.TqdmDisplay) == first
    progress.show_with(None)


def test_a_run_shows_its_work_and_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    works: list[str] = []
    real = progress.progress

    @contextmanager
    def noted(name: str, total: int | None = None) -> Iterator[Any]:
        works.append(name)
        with real(name, total) as work:
            yield work

    for module in ("callbacks.base", "callbacks.recording", "graph.tracing"):
        monkeypatch.setattr(f"lightning_prune.{module}.progress", noted)
    before = set(threading.enumerate())
    battery.train(tmp_path, battery.make_callback("magnitude"))
    name = "ResidualClassifier"
    prunes = [f"Pruning {name}, step {step} of 3" for step in (1, 2, 3)]
    timing = f"Timing {name} before and after, turn and turn about"
    assert works == [f"Tracing {name}", f"Measuring the flops of {name}", f"Measuring {name}", *prunes, timing]
    assert progress._chosen is None
    assert progress._bars == {}
    assert set(threading.enumerate()) <= before
