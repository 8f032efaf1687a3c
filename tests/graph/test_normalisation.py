"""Normalisation by statistics, whatever axis the channels lie on: mask-exact just where no statistic is over channels.

Masking is done here by hand, and compared with pruning: outputs in evaluation mode, buffers after a training step.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from engine import randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import Group

CHANNELS, TOKENS, SAMPLES = 12, 6, 4
ORDERS = {0: (2, 0, 1), 1: (0, 2, 1), 2: (0, 1, 2)}  # how (samples, tokens, channels) is permuted, by axis of channels
FEWER = "norm: is normalised over its channels, fewer of which have other statistics"


class Normalised(nn.Module):
    """Two linear layers, and between them a norm that finds the channels on some axis."""

    def __init__(self, norm: nn.Module, axis: int) -> None:
        super().__init__()
        self.make, self.norm, self.read = nn.Linear(8, CHANNELS), norm, nn.Linear(CHANNELS, 5)
        self.order = ORDERS[axis]
        self.back = tuple(self.order.index(place) for place in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).permute(self.order)
        return self.read(self.norm(x).permute(self.back).relu())


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class InTraining(nn.Module):
    """Divides by a sum over the last axis while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.square().sum(-1, keepdim=True)) if self.training else x


def by_batch(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def by_hand(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(0, 2), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


LENGTHS = {axis: [(SAMPLES, TOKENS, CHANNELS)[place] for place in order] for axis, order in ORDERS.items()}
# For each norm what makes it, given the lengths of the axes, and the axes of channels for which it is mask-exact.
NORMS: dict[str, tuple[Callable[[list[int]], nn.Module], set[int]]] = {
    "batch": (lambda sizes: nn.BatchNorm1d(sizes[1]), {1}),
    "batch, of each batch": (lambda sizes: nn.BatchNorm1d(sizes[1], track_running_stats=False), {1}),
    "batch, a function": (lambda sizes: Function(by_batch), {1}),
    "instance, affine": (lambda sizes: nn.InstanceNorm1d(sizes[1], affine=True), {1}),
    "instance, running": (lambda sizes: nn.InstanceNorm1d(sizes[1], track_running_stats=True), {1}),
    "instance, a function": (lambda sizes: Function(F.instance_norm), {0, 1}),
    "group": (lambda sizes: nn.GroupNorm(2, sizes[1]), {0, 1}),
    "group, each": (lambda sizes: nn.GroupNorm(sizes[1], sizes[1]), {0, 1}),
    "group, all": (lambda sizes: nn.GroupNorm(1, sizes[1]), {0}),
    "layer": (lambda sizes: nn.LayerNorm(sizes[2]), {0, 1}),
    "layer, two axes": (lambda sizes: Function(lambda x: F.layer_norm(x, x.shape[1:])), {0}),
    "root mean square": (lambda sizes: nn.RMSNorm(sizes[2]), {0, 1}),
    "by hand": (lambda sizes: Function(by_hand), {1}),
    "to length one": (lambda sizes: Function(partial(F.normalize, dim=1)), {0, 2}),
    "in training alone": (lambda sizes: InTraining(), {0, 1}),
}


@torch.no_grad()
def masked_by_hand(model: nn.Module, group: Group, pruned: Tensor) -> nn.Module:
    """Return a copy in which no weight reads the channels that are pruned."""
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters())
    for one in group.in_slices:
        tensors[one.tensor].index_fill_(one.axis, one.positions(pruned), 0)
    return masked


@torch.no_grad()
def largest_difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-30)).item()


def apart(model: nn.Module, group: Group, x: Tensor) -> float:
    """Return how far the masked and the pruned network are apart: outputs, and buffers of equal size after a step."""
    graph = lp.trace(model, x)
    masked = masked_by_hand(model, group, torch.arange(1, group.size, 2))
    pruned = copy.deepcopy(model)
    lp.prune(pruned, graph.plan({group.name: torch.arange(0, group.size, 2)}))
    found = [largest_difference(masked.eval()(x), pruned.eval()(x))]
    masked.train()(x)
    pruned.train()(x)
    for one, other in zip(masked.buffers(), pruned.buffers(), strict=True):
        if one.shape == other.shape:
            found.append(largest_difference(one, other))
    return max(found)


@pytest.mark.parametrize("axis", ORDERS)
@pytest.mark.parametrize("name", NORMS)
def test_mask_exact_where_no_statistic_is_over_channels(name: str, axis: int):
    make, exact_axes = NORMS[name]
    torch.manual_seed(0)
    model = randomised(Normalised(make(LENGTHS[axis]), axis)).double()
    x = torch.randn(SAMPLES, TOKENS, 8, dtype=torch.float64)
    graph = lp.trace(model, x)
    group = graph.groups.get("make")
    if axis not in exact_axes:
        assert group is None or group.not_mask_exact
        assert group is not None or graph.unprunable["make"].channels == CHANNELS
        return
    assert group is not None
    assert group.mask_exact
    assert apart(model, group, x) <= 1e-9


@pytest.mark.parametrize("name", ["batch", "batch, of each batch", "instance, affine", "instance, running", "group"])
def test_the_difference_is_there_where_it_is_told(name: str):
    make, _ = NORMS[name]
    torch.manual_seed(0)
    model = randomised(Normalised(make(LENGTHS[2]), 2)).double()
    x = torch.randn(SAMPLES, TOKENS, 8, dtype=torch.float64)
    group = lp.trace(model, x).groups["make"]
    assert group.not_mask_exact == FEWER
    assert apart(model, group, x) > 1e-3


def test_groups_that_do_not_follow_make_channels_unprunable():
    model = Normalised(Function(lambda x: F.group_norm(x, 2)), 1)  # two groups, however many channels
    graph = lp.trace(model, torch.zeros(SAMPLES, TOKENS, 8))
    assert not graph.groups
    assert "relies on the number of its channels (test_normalisation.py:" in graph.unprunable["make"].reason


# -- weights -----------------------------------------------------------------------------------------------------------


class Standardised(nn.Module):
    """Weights that are standardised produce channels, others read them."""

    def __init__(self, standardise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.standardise = standardise
        self.first = nn.Conv2d(3, CHANNELS, 1)
        self.second = nn.Conv2d(CHANNELS, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = F.conv2d(x, self.standardise(layer.weight), layer.bias).relu()
        return self.head(x)


def as_batch(weight: Tensor) -> Tensor:
    """Standardise as BiT and NFNets do it."""
    return F.batch_norm(weight.reshape(1, weight.shape[0], -1), None, None, training=True).reshape(weight.shape)


def by_sums(weight: Tensor) -> Tensor:
    return weight / weight.abs().sum((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("standardise", [as_batch, by_sums, lambda weight: F.layer_norm(weight, weight.shape[1:])])
def test_standardised_weights_read_channels_inexactly(standardise: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    model = randomised(Standardised(standardise)).double()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert graph.groups["first"].not_mask_exact
    assert apart(model, graph.groups["second"], x) <= 1e-9, "what the last layer reads as it is"
    assert graph.groups["second"].mask_exact
