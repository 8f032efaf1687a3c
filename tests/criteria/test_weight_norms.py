"""Criteria that read the weights alone, against loops over channels and cases worked out by hand."""

import math

import pytest
import torch
from engine import randomised
from torch import Tensor, nn

import lightning_prune as lp


class Network(nn.Module):
    """A shortcut, so that two layers make the same channels, a grouped convolution, and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 8, 1)
        self.norm3 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=4)
        self.norm4 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.norm2(self.block(x)))
        return self.head(self.norm4(self.grouped(torch.relu(self.norm3(self.wide(x))))).mean((2, 3)))


# The layers that produce the channels of each group, and how many neighbouring filters produce one channel.
PRODUCING = {"stem": (("stem", 1), ("block", 1)), "wide": (("wide", 2), ("grouped", 2))}
NORMS = {"stem": (("norm", 1), ("norm2", 1)), "wide": (("norm3", 2), ("norm4", 2))}


@pytest.fixture
def graph() -> lp.graph.ChannelGraph:
    model = randomised(Network()).double().eval()
    return lp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))


def vectors(graph: lp.graph.ChannelGraph, name: str, table: dict = PRODUCING) -> list[list[float]]:
    """All numbers of the weights that produce each channel, channel by channel."""
    found: list[list[float]] = [[] for _ in range(graph.groups[name].size)]
    for layer, width in table[name]:
        weight = graph.model.get_submodule(layer).weight.detach()
        for channel, numbers in enumerate(found):
            numbers += weight[channel * width : (channel + 1) * width].flatten().tolist()
    return found


def prune_some(graph: lp.graph.ChannelGraph) -> None:
    lp.prune(graph.model, graph.plan({"stem": torch.tensor([0, 2, 5])}))


def test_fpgm_is_the_sum_of_distances(graph: lp.graph.ChannelGraph) -> None:
    scores = lp.criteria.fpgm(graph)
    for name in graph.groups:
        filters = vectors(graph, name)
        sums = [sum(math.dist(one, other) for other in filters) for one in filters]
        mean = sum(sums) / len(sums)
        torch.testing.assert_close(scores[name], torch.tensor([value / mean for value in sums], dtype=torch.float64))


def test_lamp_is_the_share_of_what_is_kept(graph: lp.graph.ChannelGraph) -> None:
    scores = lp.criteria.lamp(graph)
    for name in graph.groups:
        squares = [sum(number**2 for number in numbers) for numbers in vectors(graph, name)]
        expected = [square / sum(other for other in squares if other >= square) for square in squares]
        torch.testing.assert_close(scores[name], torch.tensor(expected, dtype=torch.float64))
        assert scores[name].max() == 1.0


def test_batch_norm_scale_is_the_mean_of_absolute_scales(graph: lp.graph.ChannelGraph) -> None:
    scores = lp.criteria.batch_norm_scale(graph)
    for name in graph.groups:
        expected = [sum(map(abs, scales)) / len(scales) for scales in vectors(graph, name, NORMS)]
        torch.testing.assert_close(scores[name], torch.tensor(expected, dtype=torch.float64))


def test_l1_and_l2_are_magnitudes(graph: lp.graph.ChannelGraph) -> None:
    for name in graph.groups:
        assert torch.equal(lp.criteria.l1(graph)[name], lp.criteria.magnitude(graph, 1)[name])
        assert torch.equal(lp.criteria.l2(graph)[name], lp.criteria.magnitude(graph, 2)[name])


def test_fpgm_and_lamp_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():  # corners of a rectangle and a point between: the last is the easiest to replace
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 8.0], [3.0, 4.0]]))
    graph = lp.trace(model, torch.zeros(1, 2))
    sums = torch.tensor([19.0, 21.0, 23.0, 15.0], dtype=torch.float64)  # 6 + 8 + 5, 6 + 10 + 5, 8 + 10 + 5, 5 + 5 + 5
    torch.testing.assert_close(lp.criteria.fpgm(graph)["0"], sums / 19.5)
    lamp = torch.tensor([0.0, 36 / 100, 1.0, 25 / 125], dtype=torch.float64)  # squares 0, 36, 64, 25
    torch.testing.assert_close(lp.criteria.lamp(graph)["0"], lamp)


def test_lamp_of_equal_channels_goes_by_their_number() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    nn.init.ones_(model[0].weight)
    scores = lp.criteria.lamp(lp.trace(model, torch.zeros(1, 2)))["0"]
    torch.testing.assert_close(scores, torch.tensor([1 / 3, 1 / 2, 1.0], dtype=torch.float64))
    nn.init.zeros_(model[0].weight)
    assert lp.criteria.lamp(lp.trace(model, torch.zeros(1, 2)))["0"].tolist() == [0.0, 0.0, 0.0]


def test_group_magnitude_is_that_of_pruning_channel_by_channel(graph: lp.graph.ChannelGraph) -> None:
    scores = lp.criteria.group_magnitude(graph)
    order = sorted((float(value), name, channel) for name in scores for channel, value in enumerate(scores[name]))
    before = 0.0
    for score, name, channel in order[: -len(scores)]:  # the last one of each group cannot be pruned
        relative = {}
        for member, group in graph.groups.items():
            norms = {int(kept): 0.0 for kept in graph.kept(member)}
            for place in group.slices:
                if place.tensor.endswith("weight") and "norm" not in place.tensor:
                    for kept, row in zip(norms, graph.rows(member, place), strict=True):
                        norms[kept] += sum(number**2 for number in row.tolist())
            mean = sum(norms.values()) / len(norms)
            relative |= {(member, kept): norm / mean for kept, norm in norms.items()}
        assert (name, channel) == min(relative, key=lambda at: relative[at])
        before = max(before, relative[name, channel])
        assert score == pytest.approx(before, rel=1e-9)
        kept_now = graph.kept(name)
        lp.prune(graph.model, graph.plan({name: kept_now[kept_now != channel]}))


def test_group_magnitude_by_hand() -> None:
    model = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((1, 2), (2, 2), (2, 1))))
    for layer, weight in zip(model, ([[1.0], [3.0]], [[2.0, 0.0], [0.0, 2.0]], [[0.0, 1.0]]), strict=True):
        layer.weight.data.copy_(torch.tensor(weight))
    scores = lp.criteria.group_magnitude(lp.trace(model, torch.zeros(1, 1)))
    # 5 and 13 against 4 and 5: the first channel of the first layer is pruned, at 5 / 9. It was all that the first of
    # the second layer consumed, which is pruned next, at 0 / 2.5, and scores no less.
    assert scores["0"][0] == pytest.approx(5 / 9)
    assert scores["1"][0] == pytest.approx(5 / 9)
    assert scores["1"][0] > scores["0"][0]
    assert [float(scores[name][1]) for name in "01"] == pytest.approx([1.0, 1.0])


def test_group_magnitude_of_nothing_at_all_is_an_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    scores = lp.criteria.group_magnitude(lp.trace(model, torch.zeros(1, 2)))["0"]
    assert scores.isfinite().all()
    assert (scores.diff() > 0).all()


def test_random_is_even_repeatable_and_does_not_touch_the_random_state(graph: lp.graph.ChannelGraph) -> None:
    state = torch.get_rng_state()
    one, same, other = (lp.criteria.random(graph, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    for name in graph.groups:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
    many = lp.criteria.random(lp.trace(nn.Sequential(nn.Linear(1, 4000), nn.Linear(4000, 1)), torch.zeros(1, 1)))["0"]
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(many.var()) == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("name", ["batch_norm_scale", "fpgm", "group_magnitude", "l1", "l2", "lamp", "random"])
def test_after_a_prune_what_is_kept_is_scored_as_if_it_had_always_been_alone(
    name: str, graph: lp.graph.ChannelGraph
) -> None:
    before = lp.criteria.score(graph, name)["stem"]
    prune_some(graph)
    scores = lp.criteria.score(graph, name)["stem"]
    assert scores[[1, 3, 4]].tolist() == [-math.inf] * 3
    if name in ("random", "batch_norm_scale"):
        torch.testing.assert_close(scores[[0, 2, 5]], before[[0, 2, 5]])
        return
    again = lp.trace(_alone(graph.model), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(scores[[0, 2, 5]], lp.criteria.score(again, name)["stem"])


def _alone(model: nn.Module) -> nn.Module:
    """A network that was made in the pruned shape."""
    made = Network()
    made.stem, made.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    made.block, made.norm2, made.wide = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)
    made.load_state_dict(model.state_dict())
    return made.double().eval()


def test_groups_without_normalisation_are_named() -> None:
    graph = lp.trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="Group '0' passes no batch normalisation with scales; add '0' to ignore"):
        lp.criteria.batch_norm_scale(graph)
