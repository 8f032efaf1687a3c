"""How often the search runs a network: what it costs to trace one, whatever machine it is on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward
from lightning_prune.graph.tracer import Tracer


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note the kind of tracer of each forward pass."""
    passes: list[str] = []
    run = Forward.run

    def counting(forward: Forward, tracer: object, *arguments: object) -> None:
        passes.append(type(tracer).__name__)
        run(forward, tracer, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Forward, "run", counting)
        yield passes


class _Scaled(nn.Module):
    """A block that divides by the root of the number of its channels, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + self.outer(y * y.shape[-1] ** -0.5)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def _stack(block: Callable[[], nn.Module], depth: int) -> nn.Sequential:
    return nn.Sequential(*(block() for _ in range(depth)))


def _scaled(depth: int) -> ChannelGraph:
    model = nn.Sequential(nn.Linear(3, 8), *_stack(_Scaled, depth), nn.Linear(8, 2))
    return trace(model, torch.zeros(2, 3))


@pytest.mark.parametrize("depth", [1, 12])
def test_network_without_findings_is_observed_once_and_tried_once(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *_stack(_Residual, depth), nn.Flatten(), nn.Linear(4 * 16, 2))
    with _counted(monkeypatch) as passes:
        trace(model, torch.zeros(2, 3, 6, 6))
    assert passes == ["Tracer", "Trial"]


class _Parts(nn.Module):
    """A block that puts channels into as many parts as some function makes."""

    def __init__(self, parts: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.parts = parts
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.parts(self.inner(x))
        return x + self.outer(first * second.sigmoid())


HALVES: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "function": lambda x: torch.chunk(x, dim=-1, chunks=2),
    "tensor_split": lambda x: x.tensor_split(2, -1),
}
BY_SIZE: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "split": lambda x: x.split(x.shape[-1] // 2, -1),
    "slices": lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
}


@pytest.mark.parametrize("case", HALVES | BY_SIZE)
def test_a_number_of_parts_fits_any_number_of_channels(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Which size code splits by takes more trials to tell: it may be that of others."""
    blocks = _stack(lambda: _Parts((HALVES | BY_SIZE)[case]), 3)
    with _counted(monkeypatch) as passes:
        graph = trace(nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2)), torch.zeros(2, 3))
    assert [group.size for group in graph.groups.values()] == [8, 6, 6, 6]
    assert (passes == ["Tracer", "Trial"]) == (case in HALVES)


def test_all_blocks_that_compute_with_their_size_are_found_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for depth in (2, 6, 20):
        with _counted(monkeypatch) as passes:
            graph = _scaled(depth)
        counts[depth] = len(passes)
        assert list(graph.groups) == ["0"]
        reasons = {name: graph.unprunable[name].reason for name in graph.unprunable if name.endswith("inner")}
        assert len(reasons) == depth
        for name, reason in reasons.items():  # each names its own block
            assert reason.startswith(f"{name.removesuffix('.inner')}: computes with the number of its channels")
    assert counts[2] == counts[6] == counts[20]  # of a line of code that all run, one group is tried alone


class _Relying(nn.Module):
    """A block that does something with its channels and a number of code."""

    def __init__(self, run: Callable[[Tensor], Tensor], read: int = 12) -> None:
        super().__init__()
        self.run = run
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(read, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.run(self.inner(x)))


def _in_other_order(x: Tensor) -> Tensor:
    return torch.cat([x[..., 4:], x[..., :4]], -1)


RELYING: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "cut": (lambda x: torch.cat([x[..., :4].relu(), x[..., 4:]], -1), 12),
    "in other order": (_in_other_order, 12),
    "product": (lambda x: x[..., :6] * x[..., 6:].sigmoid(), 6),
    "split": (lambda x: x.view(2, 3, 4).relu().view(2, 12), 12),
    "number": (lambda x: x * torch.tensor(float(x.shape[-1])), 12),
}


@pytest.mark.parametrize("case", RELYING)
def test_all_blocks_that_rely_on_their_size_are_found_together(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    counts = set()
    for depth in (2, 7):
        blocks = _stack(lambda: _Relying(*RELYING[case]), depth)
        with _counted(monkeypatch) as passes:
            graph = trace(nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2)), torch.zeros(2, 3))
        counts.add(len(passes))
        assert list(graph.groups) == ["0"]
        for block in range(1, depth + 1):
            assert graph.unprunable[f"{block}.inner"].reason.startswith(f"{block}: ")
    assert len(counts) == 1


def test_a_block_that_does_not_rely_on_its_size_at_the_same_line_stays_prunable() -> None:
    def cut(stop: int | None) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([x[..., :stop].relu()] + ([x[..., stop:]] if stop else []), -1)

    blocks = [_Relying(cut(stop)) for stop in (4, None, 4)]
    graph = trace(nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2)), torch.zeros(2, 3))
    assert list(graph.groups) == ["0", "2.inner"]


class _Shared(nn.Module):
    """Two layers that are multiplied by a number that the width of the first alone gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.second = nn.Linear(3, 6)
        self.head = nn.Linear(8, 2)
        self.tail = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        scale = 1 / first.shape[-1]
        return self.head(first * scale) + self.tail(second * scale)


def test_group_that_is_given_a_number_of_another_one_stays_prunable() -> None:
    graph = trace(_Shared(), torch.zeros(2, 3))
    assert list(graph.groups) == ["second"]
    assert "computes with the number of its channels" in graph.unprunable["first"].reason


class _Flattened(nn.Module):
    """Adds one tie for each part of a flattened image: as many as it has positions."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.flatten(1).tensor_split((64,), 1)
        return torch.cat([first, rest], 1)


def test_equal_parts_are_one_tie() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), _Flattened(), nn.Linear(4 * 64 * 64, 2))
    forward = Forward(model, "", torch.zeros(1, 1, 64, 64))
    tracer = forward.observe(lambda: Tracer(OperatorTables(RULES, {}), Known()), training=False)
    assert 0 < len(tracer.record.ties) < 10


class _MeasuredAlone(nn.Module):
    """Cannot run in training mode, and puts a list of numbers where its input is, which is a step more without data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise TypeError("has no output in training mode")
        return self.layers(x - torch.as_tensor([0.1, 0.2, 0.3], device=x.device))


def test_a_mode_that_does_not_run_says_nothing_of_how_the_other_one_does() -> None:
    graph = trace(_MeasuredAlone(), torch.zeros(2, 3))
    assert list(graph.groups) == ["layers.0"]
    assert list(graph.unprunable) == ["layers.2"]


class ByClass(nn.Module):
    """Goes through the classes that it finds one by one, as detectors do to drop boxes that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 20, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.stem(x).relu()).mean((2, 3))
        found = scores.argmax(1)
        kept = torch.zeros_like(found, dtype=torch.bool)
        for number in torch.unique(found):
            kept[torch.where(found == number)[0][:1]] = True
        return scores, torch.where(kept)[0]


def test_how_often_a_loop_over_what_is_found_runs_tells_nothing_of_widths():
    torch.manual_seed(0)
    model, images = ByClass(), torch.randn(64, 3, 8, 8)
    graph = trace(model, images)
    assert list(graph.groups) == ["stem"]
