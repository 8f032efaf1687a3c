"""Magnitude against a reference that loops over channels."""

import math

import pytest
import torch
from engine import randomised
from torch import nn

import lightning_prune as lp


class Network(nn.Module):
    """A shortcut, so that two layers make the same channels, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 12, 1, groups=3)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.grouped(torch.relu(self.block(x))).mean((2, 3)))


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_against_a_naive_reference(p: float):
    model = randomised(Network()).double()
    graph = lp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    scores = lp.criteria.magnitude(graph, p)
    stem = [sum(abs(float(v)) ** p for v in model.stem.weight[i].detach().flatten()) ** (1 / p) for i in range(6)]
    # a channel of `block` is a group of `grouped`: two filters of the one, four of the other
    grouped = [
        sum(
            abs(float(v)) ** p
            for weight in (model.block.weight[2 * i : 2 * i + 2], model.grouped.weight[4 * i : 4 * i + 4])
            for v in weight.detach().flatten()
        )
        ** (1 / p)
        for i in range(3)
    ]
    for name, reference in {"stem": stem, "block": grouped}.items():
        expected = torch.tensor(reference, dtype=torch.float64)
        torch.testing.assert_close(scores[name], expected / expected.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2])
def test_half_precision_is_summed_in_full(dtype: torch.dtype, p: int):
    model = nn.Sequential(nn.Linear(400, 64), nn.Linear(64, 2)).to(dtype)
    x = torch.zeros(1, 400)
    half, full = (lp.criteria.magnitude(lp.trace(m, x.to(m[0].weight)), p)["0"] for m in (model, model.float()))
    assert torch.equal(half, full)


@pytest.mark.parametrize("p", [1, 2])
def test_coupled_layers_count_together(p: int):
    class Shortcut(Network):
        def forward(self, x):
            x = self.stem(x)
            return self.head(self.grouped(x + self.block(x)).mean((2, 3)))

    model = randomised(Shortcut()).double()
    scores = lp.criteria.magnitude(lp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64)), p)
    powers = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for weight in (model.stem.weight[2 * i : 2 * i + 2], model.block.weight[2 * i : 2 * i + 2]):
            powers[i] += weight.abs().pow(p).sum()
        powers[i] += model.grouped.weight[4 * i : 4 * i + 4].abs().pow(p).sum()
    norms = powers ** (1 / p)
    torch.testing.assert_close(scores["stem"], norms / norms.mean())


def test_pruned_channels_score_minus_infinity_and_kept_ones_as_they_are_now():
    model = randomised(Network())
    graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
    lp.prune(model, graph.plan({"stem": torch.tensor([1, 4, 5])}))
    scores = lp.criteria.magnitude(graph)["stem"]
    assert scores[[0, 2, 3]].tolist() == [-math.inf] * 3
    norms = model.stem.weight.abs().sum((1, 2, 3))
    torch.testing.assert_close(scores[[1, 4, 5]], (norms / norms.mean()).detach())


@pytest.mark.parametrize("p", [0, -1, math.nan])
def test_the_order_must_be_positive(p: float):
    graph = lp.trace(randomised(Network()), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="p must be the order of a norm, above 0"):
        lp.criteria.magnitude(graph, p)
