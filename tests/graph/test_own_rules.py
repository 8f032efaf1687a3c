"""Rules of the user's own, for modules that the engine cannot look into."""

from collections.abc import Iterator

import pytest
import torch
from engine import assert_pruned, randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import rule, size_attributes, sizes
from lightning_prune.graph.rules import RULES

IMAGE = torch.zeros(2, 3, 8, 8)
SCALE = f"{__name__}.ChannelScale"
HALVES = f"{__name__}.Halves"
CHECKED = f"{__name__}.Checked"


class Scale(torch.autograd.Function):
    """A product whose backward pass nobody can see."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 2, 3), keepdim=True)


class ChannelScale(nn.Module):
    """One factor per channel, the number of which is written down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(x, self.weight.view(1, self.channels, 1, 1))


class Halves(nn.Module):
    """The sum of the first and the second half of the channels, worked out on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return Scale.apply(x[:, :half], torch.ones(1, 1, 1, 1).to(x)) + x[:, half:]


class Checked(nn.Module):
    """A convolution in a module that checks how many channels it is given, and shapes what it returns by it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.channels, self.sizes = str(channels), [channels]  # no number that could be followed

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == int(self.channels)
        return self.inner(x).view(len(x), int(self.channels), -1).view_as(x) + x


@pytest.fixture
def tables() -> Iterator[None]:
    """Take the rules of a test out of the table again."""
    yield
    for name in (SCALE, HALVES, CHECKED):
        RULES.pop(name, None)
        sizes._SYNC_BY_CLASS_NAME.pop(name, None)


def teach_scale() -> None:
    @rule(SCALE)
    def channel_scale(tracer, call):
        x = call.args[0]
        tracer.tie(
            tracer.labels(x, 1), tracer.labels(call.operator.weight, 0), "is scaled by a fixed number of factors"
        )
        tracer.set_labels(call.output, tracer.all_labels(x))

    @size_attributes(SCALE)
    def sizes(module):
        module.channels = module.weight.shape[0]


def network() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3), ChannelScale(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def test_without_a_rule_the_module_is_unprunable():
    graph = lp.trace(network(), IMAGE)
    assert not graph.groups
    assert "autograd function Scale" in graph.unprunable["0"].reason


def test_a_rule_and_size_attributes_make_it_prunable(tables):
    teach_scale()
    model = network()
    assert_pruned(
        model,
        IMAGE,
        {"0": [1, 3]},
        {"0.weight": {0: [1, 3]}, "0.bias": {0: [1, 3]}, "1.weight": {0: [1, 3]}, "3.weight": {1: [1, 3]}},
    )


def checked_network() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(Checked(6)), nn.Conv2d(6, 2, 1)))


def test_a_module_that_writes_down_the_sizes_of_others_is_taught_by_these(tables):
    assert "0: relies on the number" in lp.trace(checked_network(), IMAGE).unprunable["0"].reason

    @size_attributes(CHECKED)
    def sizes(module):
        module.channels = str(module.inner[1].in_channels)
        module.sizes = [int(module.channels)]

    kept, inner = [0, 2, 5], "1.0.inner.1"
    expected = {
        "0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept},
        f"{inner}.weight": {0: kept, 1: kept}, f"{inner}.bias": {0: kept},
    }  # fmt: skip
    assert_pruned(checked_network(), IMAGE, {"0": kept}, expected)


def test_such_sizes_are_as_they_were_after_tracing_and_after_a_prune_that_fails(tables):
    @size_attributes(CHECKED)
    def sizes(module):
        module.channels = str(module.inner[1].in_channels)
        module.sizes.append(int(module.channels))
        if module.channels == "2":
            raise ZeroDivisionError

    model = checked_network()
    graph = lp.trace(model, IMAGE)
    assert (model[1][0].channels, model[1][0].sizes) == ("6", [6])
    with pytest.raises(ZeroDivisionError):
        lp.prune(model, graph.plan({"0": torch.tensor([0, 2])}))
    assert (model[1][0].channels, model[1][0].inner[1].in_channels) == ("6", 6)
    lp.prune(model, graph.plan({"0": torch.tensor([0, 2, 3])}))
    assert model[1][0].channels == "3"
    assert model(IMAGE).shape == (2, 2, 8, 8)


def test_training_goes_on_after_the_prune(tables):
    teach_scale()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    graph = lp.trace(model, IMAGE)
    lp.prune(model, graph.plan({"0": torch.tensor([0, 2])}), [optimizer])
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert model[1].channels == 2
    assert model[1].weight.grad.shape == (2,)


def test_a_rule_that_says_too_little_is_found_out(tables):
    @rule(SCALE)
    def forgets_the_weight(tracer, call):
        tracer.set_labels(call.output, tracer.all_labels(call.args[0]))

    graph = lp.trace(network(), IMAGE)
    assert not graph.groups
    assert "1: relies on the number of its channels" in graph.unprunable["0"].reason


def test_a_rule_that_raises_makes_unprunable_what_the_module_touches(tables):
    @rule(SCALE)
    def broken(tracer, call):
        raise KeyError("no such thing")

    graph = lp.trace(network(), IMAGE)
    assert not graph.groups
    assert (
        "ChannelScale in a way that its rule does not know (KeyError('no such thing'))" in graph.unprunable["0"].reason
    )


def test_channels_of_the_input_may_be_tied_to_each_other(tables):
    @rule(HALVES)
    def halves(tracer, call):
        labels = tracer.labels(call.args[0], 1)
        first, second = labels.chunk(2)
        tracer.tie(first, second, "adds the halves of its channels")
        tracer.set_labels(call.output, {1: first})

    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), Halves(), nn.Conv2d(3, 2, 1)))
    kept = [0, 2, 3, 5]
    assert_pruned(
        model,
        IMAGE,
        {"0": [0, 2]},
        {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: [0, 2]}},
    )
