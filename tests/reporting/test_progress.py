"""What takes long is announced, and what does not is not."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import battery
import pytest

from lightning_prune.callbacks import base
from lightning_prune.reporting import progress


def test_long_work_is_announced_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, said = [], threading.Event()
    monkeypatch.setattr(progress, "rank_zero_info", lambda line: (lines.append(line), said.set()))
    with progress.announce("Tracing a network", seconds=0.01):
        assert said.wait(30)
    assert lines == ["Tracing a network ..."]


def test_short_work_is_not_announced_whether_it_succeeds_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, before = [], set(threading.enumerate())
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    with progress.announce("Tracing a network", seconds=60):
        pass
    with pytest.raises(ValueError, match="no network"), progress.announce("Tracing a network", seconds=60):
        raise ValueError("no network")
    for timer in set(threading.enumerate()) - before:
        timer.join(30)  # cancelled: ends without waiting for its time
        assert not timer.is_alive()
    assert lines == []


def test_tracing_measuring_and_every_prune_are_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    works: list[str] = []

    @contextmanager
    def announce(work: str) -> Iterator[None]:
        works.append(work)
        yield

    monkeypatch.setattr(base, "announce", announce)
    battery.train(tmp_path, battery.make_callback("magnitude"))
    name = "ResidualClassifier"
    prunes = [f"Pruning {name}, step {step} of 3" for step in (1, 2, 3)]
    assert works == [f"Tracing {name}", f"Measuring the flops of {name}", f"Measuring {name}", *prunes]
