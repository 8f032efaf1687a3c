"""The oracle against pruning a copy for each channel, and worked out by hand."""

import copy
import math

import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp


class Network(nn.Module):
    """A shortcut, so that two layers make the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.inner, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block(x))
        return self.head(torch.relu(self.inner(x)).mean((2, 3)))


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 5, 5, dtype=torch.float64), torch.randint(3, (n,))) for n in (4, 4, 2)]


def by_hand(model: nn.Module, kept: dict[str, Tensor], graph: lp.graph.ChannelGraph) -> float:
    copied = copy.deepcopy(model).eval()
    lp.prune(copied, graph.plan(kept))
    with torch.no_grad():
        losses = [F.cross_entropy(copied(x), y, reduction="none") for x, y in data()]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_against_pruning_a_copy_for_each_channel(absolute: bool, pruned: bool) -> None:
    model = randomised(Network()).double()
    graph = lp.trace(model, torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    if pruned:
        lp.prune(model, graph.plan({"stem": torch.tensor([0, 2, 5]), "inner": torch.tensor([3])}))
    scores = lp.criteria.oracle(graph, data(), absolute=absolute)
    own_loss = lp.criteria.oracle(
        graph, data(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), absolute=absolute
    )
    before, signs = by_hand(model, {}, graph), set()
    for name, group in graph.groups.items():
        kept = graph.kept(name)
        for channel in range(group.size):
            if channel not in kept:
                expected = -math.inf
            elif len(kept) == 1:
                expected = math.inf
            else:
                change = by_hand(model, {name: kept[kept != channel]}, graph) - before
                signs.add(change > 0)
                expected = abs(change) if absolute else change
            assert float(scores[name][channel]) == pytest.approx(expected, abs=1e-10)
            assert float(own_loss[name][channel]) == pytest.approx(expected, abs=1e-10)
    assert signs == {True, False}


def test_is_registered_and_takes_its_settings_by_name() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
    model[2].weight.data.copy_(torch.tensor([[3.0, -2.0]]))
    x = torch.tensor([[1.0], [3.0]])  # the mean of what comes out: 2 * (3 - 4)
    graph = lp.trace(model, x)
    found = [
        lp.criteria.score(graph, {"name": "oracle", "absolute": absolute}, [x], lambda model, x: model(x).mean())
        for absolute in (True, False)
    ]
    assert [scores["0"].tolist() for scores in found] == [[6.0, 8.0], [-6.0, 8.0]]
