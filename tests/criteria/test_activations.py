"""Mean activation and the percentage of zeros, against loops over what is consumed."""

import math

import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp


class Network(nn.Module):
    """Two layers consume the first channels: one at all positions, one after pooling and flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x) - 0.5)
        return self.head(F.avg_pool2d(x, 4).flatten(1))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sum()


def mean_by_loops(model: nn.Module, batches: list[Tensor], value: object) -> Tensor:
    """The mean over the two layers of the mean over what they consume, channel by channel."""
    consumed: dict[str, list[list[float]]] = {"block": [[] for _ in range(4)], "head": [[] for _ in range(4)]}
    for batch in batches:
        first = F.relu(model.stem(batch))
        second = F.avg_pool2d(F.relu(first + model.block(first) - 0.5), 4)
        for name, maps in (("block", first), ("head", second)):
            for sample in maps:
                for channel in range(4):
                    consumed[name][channel] += [value(float(number)) for number in sample[channel].flatten()]
    means = [[sum(numbers) / len(numbers) for numbers in channels] for channels in consumed.values()]
    return torch.tensor(means, dtype=torch.float64).mean(0)


@pytest.fixture
def graph() -> lp.graph.ChannelGraph:
    return lp.trace(randomised(Network()).double(), torch.zeros(1, 1, 8, 8, dtype=torch.float64))


def batches() -> list[Tensor]:
    return [torch.randn(size, 1, 8, 8, dtype=torch.float64) for size in (4, 4, 1)]


@torch.no_grad()
def test_mean_activation_against_loops(graph: lp.graph.ChannelGraph) -> None:
    data = batches()
    expected = mean_by_loops(graph.model, data, lambda number: number)
    scores = lp.criteria.mean_activation(graph, data, loss)
    torch.testing.assert_close(scores["stem"], expected / expected.norm())


@torch.no_grad()
def test_apoz_against_loops(graph: lp.graph.ChannelGraph) -> None:
    data = batches()
    expected = mean_by_loops(graph.model, data, lambda number: float(number != 0.0))
    scores = lp.criteria.apoz(graph, data, loss)["stem"]
    torch.testing.assert_close(scores, expected)
    assert 0 < float(scores.min()) <= float(scores.max()) < 1


@pytest.mark.parametrize("name", ["apoz", "mean_activation"])
def test_after_a_prune_channels_keep_their_numbers(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    data = [torch.randn(30, 2, dtype=torch.float64)]
    graph = lp.trace(model, data[0])
    before = lp.criteria.score(graph, name, data, loss)["0"][[1, 3]]
    lp.prune(model, graph.plan({"0": torch.tensor([1, 3])}))
    after = lp.criteria.score(graph, name, data, loss)["0"]
    assert after[[0, 2]].tolist() == [-math.inf] * 2
    torch.testing.assert_close(after[[1, 3]] / after[1], before / before[0])


def test_a_loss_that_runs_nothing_is_reported(graph: lp.graph.ChannelGraph) -> None:
    with pytest.raises(ValueError, match="Nothing of group 'stem' was consumed: there is no batch, or the loss does"):
        lp.criteria.apoz(graph, batches(), lambda model, batch: batch.sum())


def test_layers_that_cannot_be_watched_are_named() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    graph = lp.trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), Mix()), torch.zeros(1, 2))
    data = [torch.randn(5, 2)]
    for name in ("apoz", "mean_activation", "taylor"):
        with pytest.raises(ValueError, match=r"cannot watch what '2' \(Mix\) consumes of group '0'; add '0' to ignore"):
            lp.criteria.score(graph, name, data, loss)
    gate = lp.criteria.score(graph, {"name": "taylor", "variant": "gate"}, data, loss)["0"]
    hidden = graph.model[:2](data[0])
    torch.testing.assert_close(gate.float(), (hidden * graph.model[2].weight).sum(0).square().detach())
