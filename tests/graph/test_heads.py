"""Heads that a size of one of them splits off: as many leave as there are channels, whatever stands before."""

import pytest
import torch
from engine import assert_pruned, difference, random_plan, randomised
from torch import Tensor, nn

import lightning_prune as lp

TOKENS = torch.randn(2, 6, 8, dtype=torch.float64)


class Heads(nn.Module):
    """Splits channels into as many heads of sixteen as there are."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.before = nn.Sequential(*(nn.Linear(8, 8) for _ in range(before)))
        self.q, self.out = nn.Linear(8, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.before(x))
        return self.out(q.view(*q.shape[:-1], -1, 16).softmax(-1).flatten(-2))


@pytest.mark.parametrize("before", range(4))
def test_heads_are_pruned_whatever_the_number_of_the_group(before: int):
    model = randomised(Heads(before).double()).eval()
    graph = lp.trace(model, TOKENS)
    assert not [name for name in graph.unprunable if name != "out"]
    assert (graph.groups["q"].size, graph.groups["q"].width) == (4, 16)
    for _ in range(2):
        assert difference(model, graph, random_plan(graph), TOKENS) <= 1e-9
    kept = [*range(16), *range(32, 48)]
    expected = {"q.weight": {0: kept}, "q.bias": {0: kept}, "out.weight": {1: kept}}
    assert_pruned(model, TOKENS, {"q": [0, 2]}, expected)


@pytest.mark.parametrize("written", ["first", "last"])
def test_the_size_that_counts_channels_becomes_smaller(written: str):
    class Split(Heads):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(self.before(x))
            channels = q.shape[-1]
            sizes = (channels // 16, 16) if written == "first" else (16, channels // 16)
            return self.out(q.reshape(2, 6, *sizes).sigmoid().flatten(-2))

    model = randomised(Split(1).double()).eval()
    graph = lp.trace(model, TOKENS)
    assert graph.groups["q"].size == 4
    assert graph.groups["q"].mask_exact
    for _ in range(2):
        assert difference(model, graph, random_plan(graph), TOKENS) <= 1e-9
