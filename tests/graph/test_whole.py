"""Functions that are followed as one operator: it computes what they do, and shows what all of them would show."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lightning_prune as lp
from lightning_prune.graph import tracer
from lightning_prune.graph.whole import WHOLE

ROWS, IMAGE, STATISTICS = torch.rand(3, 6), torch.rand(2, 6, 5, 4) - 0.5, torch.rand(6) + 0.5
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (functional.linear, (ROWS, torch.rand(4, 6)), {"bias": torch.rand(4)}),
    (functional.scaled_dot_product_attention, (torch.rand(2, 3, 4),) * 3, {}),
    (Tensor.add_, (ROWS.clone(), 1), {}),
    (Tensor.add_, (ROWS.clone(), ROWS), {"alpha": 2}),
    (torch.conv1d, (torch.rand(2, 6, 9), torch.rand(4, 6, 3), None, 2), {"padding": (1,)}),
    (torch.conv2d, (IMAGE, torch.rand(4, 3, 3, 2), torch.rand(4), (2, 1), 1), {"groups": 2}),
    (torch.conv2d, (IMAGE, torch.rand(4, 6, 3, 3)), {"padding": "same"}),
    (torch.conv3d, (torch.rand(1, 2, 3, 3, 3), torch.rand(4, 2, 2, 2, 2)), {"dilation": 2}),
    (functional.batch_norm, (IMAGE, STATISTICS, STATISTICS, STATISTICS, None, False, 0.1, 1e-3), {}),
    (functional.batch_norm, (IMAGE, None, None), {"training": True}),
    (functional.hardtanh, (IMAGE, -0.1, 0.2), {}),
    (functional.hardtanh, (IMAGE,), {"max_val": 0.3, "inplace": True}),
    (functional.relu, (IMAGE,), {}),
    (functional.relu, (IMAGE, True), {}),
    (functional.silu, (IMAGE,), {"inplace": True}),
    (functional.hardswish, (IMAGE,), {}),
]


@pytest.mark.parametrize(("function", "args", "named"), CALLS)
def test_the_operator_computes_the_same(function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    copied = [each.clone() if isinstance(each, Tensor) else each for each in args]
    expected = function(*copied, **named)
    called = WHOLE[function](*args, **named)
    if called is None:  # what is left to PyTorch
        assert named in ({"alpha": 2}, {"padding": "same"})
        return
    operator, arguments, settings = called
    copied = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    found = operator(*copied, **settings)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)


def test_every_function_is_called() -> None:
    assert {function for function, *_ in CALLS} == set(WHOLE)


class _All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(True))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y.add_(self.plain(x), alpha=2).add_(1)
        return self.out(functional.hardswish(y).mean((2, 3)))


def test_a_graph_is_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _All(), torch.zeros(2, 3, 8, 8)
    found = lp.trace(model, x)
    monkeypatch.setattr(tracer, "WHOLE", {})
    expected = lp.trace(model, x)
    assert len(found.groups) == 1
    assert (found.groups, found.unprunable, found.terms) == (expected.groups, expected.unprunable, expected.terms)
