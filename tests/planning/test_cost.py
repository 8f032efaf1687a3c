"""Costs against numbers worked out by hand; against fvcore, see graph/test_networks.py."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine import counted_flops
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import lightning_prune as lp
from lightning_prune.planning import CostModel, metric_named
from lightning_prune.reporting.flops import count_flops


def test_worked_out_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    graph = lp.trace(model, torch.zeros(5, 3, 6, 6))
    pixels = 5 * 4 * 4
    flops = CostModel(graph, "flops")
    # convolution, two passes of normalisation, one of pooling, linear
    assert flops.original == pixels * 9 * 3 * 4 + 2 * pixels * 4 + pixels * 4 + 5 * 4 * 2
    assert flops({"0": 3}) == pixels * 9 * 3 * 3 + 2 * pixels * 3 + pixels * 3 + 5 * 3 * 2
    params = CostModel(graph, "params")
    assert params.original == 9 * 3 * 4 + 8 + 10
    assert params({"0": 1}) == 9 * 3 + 2 + 4
    channels = CostModel(graph, "channels")
    assert (channels.original, channels({"0": 1})) == (4, 1)


def test_costs_are_quadratic_where_both_sides_shrink():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    cost = CostModel(lp.trace(model, torch.zeros(1, 3)), "flops")
    assert cost({"0": 2, "1": 3}) == 3 * 2 + 2 * 3 + 3 * 2


def test_what_lies_outside_of_the_submodule_does_not_count():
    model = nn.ModuleDict({"teacher": nn.Linear(9, 9), "student": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    graph = lp.trace(model, torch.zeros(1, 3), module="student")
    for metric, original in (("flops", 12 + 8), ("params", 16 + 10), ("channels", 4)):
        assert CostModel(graph, metric).original == original


def test_grouped_convolutions_cost_what_is_kept_of_their_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.Conv2d(8, 2, 1))
    cost = CostModel(lp.trace(model, torch.zeros(1, 3, 1, 1)), "flops")
    assert cost.original == 3 * 8 + 8 * 2 + 8 * 2
    assert cost({"0": 1}) == 3 * 2 + 2 * 2 + 2 * 2


def test_unprunable_channels_cost_but_are_not_counted_as_channels():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    graph = lp.trace(model, torch.zeros(1, 3))
    assert CostModel(graph, "channels").original == 4
    assert CostModel(graph, "flops").original == 12 + 20


def test_unknown_metric():
    graph = lp.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="metric must be one of flops, params, channels, latency; got 'flop'"):
        metric_named("flop")
    with pytest.raises(ValueError, match="is known in flops, params, channels, not in 'flop'; latency is known once"):
        CostModel(graph, "flop")


# -- FLOPs by hand, and counted on the pruned network ------------------------------------------------------------------


class Between(nn.Module):
    """A layer that makes eight channels, something, and a layer that reads them."""

    def __init__(self, between: Callable[..., Tensor], make: nn.Module, read: nn.Module, *layers: nn.Module) -> None:
        super().__init__()
        self.between, self.make, self.read, self.layers = between, make, read, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.between(self.make(x), *self.layers))


class Standardised(nn.Conv2d):
    """Standardises its weight by a function of torch."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape(self.weight.shape), self.bias)


def convolutional(between: Callable[..., Tensor], *layers: nn.Module) -> nn.Module:
    return Between(between, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), *layers)


def run(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def on_grid(x: Tensor) -> Tensor:
    grid = F.affine_grid(torch.eye(2, 3)[None].repeat(2, 1, 1), [2, x.shape[1], 3, 3], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


class FixedOutput(nn.Bilinear):
    """A bilinear layer of whose output all channels are summed up by number."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return super().forward(first, second).cumsum(-1)


IMAGE = torch.zeros(2, 3, 5, 5)
STEPS = torch.zeros(7, 2, 3)  # (steps, samples, features)
PIXELS = 2 * 5 * 5
# What to count, on what, and its FLOPs as a function of the width of the only group, worked out by hand.
COUNTED: dict[str, tuple[nn.Module, Tensor, Callable[[int], int]]] = {
    "statistics of each batch": (
        convolutional(run, nn.BatchNorm2d(8, track_running_stats=False)),
        IMAGE,
        lambda n: PIXELS * (3 * n + 5 * n + n * 2),
    ),
    "statistics of each batch, not affine": (
        convolutional(run, nn.BatchNorm2d(8, affine=False, track_running_stats=False)),
        IMAGE,
        lambda n: PIXELS * (3 * n + 4 * n + n * 2),
    ),
    "running statistics": (convolutional(run, nn.BatchNorm2d(8)), IMAGE, lambda n: PIXELS * (3 * n + 2 * n + n * 2)),
    "a standardised weight": (
        nn.Sequential(Standardised(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        IMAGE,
        lambda n: 4 * 3 * n + PIXELS * (3 * n + n * 2),
    ),
    "padding by name": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 2, 5, padding="same")),
        IMAGE,
        lambda n: PIXELS * (9 * 3 * n + 25 * n * 2),
    ),
    "no padding by name": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding="valid"), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        IMAGE,
        lambda n: 2 * 3 * 3 * (9 * 3 * n + n * 2),
    ),
    "points on a grid": (convolutional(on_grid), IMAGE, lambda n: PIXELS * 3 * n + 2 * 9 * (4 * n + n * 2)),
    "pooled along one axis": (
        Between(lambda x: F.adaptive_avg_pool1d(x, 2), nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)),
        torch.zeros(2, 3, 5),
        lambda n: 2 * (5 * 3 * n + 2 * n * 2),
    ),
    "a bilinear layer": (
        Between(lambda x, layer: layer(x, torch.ones(7, 2, 4)), nn.Linear(3, 8), nn.Linear(6, 2), FixedOutput(8, 4, 6)),
        STEPS,
        lambda n: 14 * (3 * n + n * 4 * 6 + 6 * 2),
    ),
    "a deformable convolution in groups": (
        convolutional(
            lambda x, layer: layer(x, torch.zeros(2, 18, 5, 5)), DeformConv2d(8, 8, 3, padding=1, groups=8, bias=False)
        ),
        IMAGE,
        lambda n: PIXELS * (3 * n + 9 * n + n * 2),
    ),
    "a repeated matrix": (
        Between(lambda x: torch.ones(4, 7) @ x.transpose(0, 1), nn.Linear(3, 8), nn.Linear(8, 2)),
        STEPS,
        lambda n: 14 * 3 * n + 2 * 4 * 7 * n + 2 * 4 * n * 2,
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_flops_are_those_worked_out_by_hand_and_those_of_the_pruned_network(case: str):
    model, inputs, flops = COUNTED[case]
    graph = lp.trace(model.eval(), inputs)
    (name,) = graph.groups
    cost = CostModel(graph, "flops")
    assert [cost({name: width}) for width in (8, 3)] == [flops(8), flops(3)]
    assert count_flops(model, inputs).total == flops(8)
    lp.prune(model, graph.plan({name: torch.arange(3)}))
    assert count_flops(model, inputs).total == flops(3)


# Products that no channel can be pruned of, in forms that fvcore has no count for.
UNPRUNABLE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "a sum over two axes": (lambda x: torch.tensordot(x, torch.ones(2, 8, 8), ([1, 2], [0, 1])), 7 * 2 * 8 * 8),
    "a sum over one axis": (lambda x: torch.inner(x, torch.ones(8, 8)), 14 * 8 * 8),
    "products added to matrices": (lambda x: x.baddbmm(x @ x.transpose(1, 2), x), 2 * 7 * 2 * 2 * 8),
    "products added up": (lambda x: torch.addbmm(x[0], torch.ones(7, 2, 2), x, beta=0, alpha=2), 7 * 2 * 2 * 8),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_products_of_all_forms_cost_their_multiply_adds(case: str):
    between, products = UNPRUNABLE[case]
    model = Between(between, nn.Linear(3, 8), nn.Linear(8, 2)).eval()
    flops = 14 * 3 * 8 + products + model(STEPS).numel() * 8
    assert CostModel(lp.trace(model, STEPS), "flops").original == count_flops(model, STEPS).total == flops


class Recurrent(nn.Module):
    """A recurrent layer and a linear one, which may run on data alone."""

    def __init__(self, layer: nn.Module, width: int, looks: bool) -> None:
        super().__init__()
        self.layer, self.head, self.looks = layer, nn.Linear(width, 5), looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and not bool(x.isfinite().all()):
            raise ValueError("not finite")
        return self.head(self.layer(x)[0])


RECURRENT: dict[str, tuple[nn.Module, int, int]] = {  # the layer, the width of its output, its weights by hand
    "lstm": (nn.LSTM(3, 8), 8, 4 * 8 * (3 + 8)),
    "gru": (nn.GRU(3, 8), 8, 3 * 8 * (3 + 8)),
    "elman": (nn.RNN(3, 8, nonlinearity="relu"), 8, 8 * (3 + 8)),
    "both ways, projected": (nn.LSTM(3, 8, bidirectional=True, proj_size=4), 8, 2 * (4 * 8 * (3 + 4) + 4 * 8)),
    "two of them": (nn.LSTM(3, 8, num_layers=2), 8, 4 * 8 * (3 + 8) + 4 * 8 * (8 + 8)),
}


@pytest.mark.parametrize("looks", [False, True], ids=["without data", "on data"])
@pytest.mark.parametrize("case", RECURRENT)
def test_a_recurrent_layer_costs_its_weights_at_each_step(case: str, looks: bool):
    layer, width, weights = RECURRENT[case]
    model = Recurrent(layer, width, looks)
    graph = lp.trace(model, STEPS)
    flops = 7 * 2 * (weights + width * 5)
    assert CostModel(graph, "flops").original == flops
    counted = count_flops(model, STEPS)
    assert (counted.total, counted.left_out) == (flops, {"recurrent layers": 7 * 2 * weights})


# -- attention ---------------------------------------------------------------------------------------------------------

TOKENS = torch.zeros(2, 7, 3)
SHIFT = torch.zeros(7, 7)
# Attention with a scale of its own, in every form that says the same.
ATTENDING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one operator": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5),
    "with a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SHIFT, scale=0.5),
    "with a mask of yes and no": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SHIFT == 0, scale=0.5),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5),
    "with dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, scale=0.5),
    "heads that share keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], enable_gqa=True, scale=0.5
    ),
    "heads among the samples": lambda q, k, v: F.scaled_dot_product_attention(
        *(one.flatten(0, 1) for one in (q, k, v)), scale=0.5
    ).unflatten(0, (-1, 4)),
    "two products": lambda q, k, v: (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v,
    "two sums over indices": lambda q, k, v: torch.einsum(
        "bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v
    ),
    "a product added to a matrix": lambda q, k, v: torch.bmm(
        torch.baddbmm(SHIFT, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (-1, 4)),
}


class Attention(nn.Module):
    """Four heads, of 5 channels for queries and keys and 6 for values, with hidden layers before and behind them."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.make, self.hidden, self.head = nn.Linear(3, 8), nn.Linear(24, 10), nn.Linear(10, 2)
        self.q, self.k, self.v = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.hidden(attended).relu())


@pytest.mark.parametrize("case", ATTENDING)
def test_attention_costs_its_two_products_however_it_is_written(case: str):
    model = Attention(ATTENDING[case]).eval()
    graph = lp.trace(model, TOKENS)
    products = 2 * 4 * 7 * 7 * (5 + 6)
    flops = 2 * 7 * (3 * 8 + 8 * (20 + 20 + 24) + 24 * 10 + 10 * 2) + products
    assert CostModel(graph, "flops").original == count_flops(model, TOKENS).total == flops
    for keep in (0.9, 0.6, 0.4):
        plan = graph.plan({name: torch.arange(round(group.size * keep)) for name, group in graph.groups.items()})
        lp.prune(model, plan)
        expected = CostModel(graph, "flops")(plan.widths)
        assert expected == count_flops(model, TOKENS).total
        if case != "a product added to a matrix":  # which fvcore has no count for
            assert expected == counted_flops(model, TOKENS)


class Layer(nn.Module):
    """A layer of attention of torch, between linear layers."""

    def __init__(self, weights: bool, mask: Tensor | None, **settings: int) -> None:
        super().__init__()
        self.make, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.weights, self.mask = weights, mask

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        attended, _ = self.attention(x, x, x, need_weights=self.weights, attn_mask=self.mask)
        return self.head(attended)


@pytest.mark.parametrize("mask", [None, SHIFT, SHIFT > 0], ids=["no mask", "a mask", "a mask of yes and no"])
@pytest.mark.parametrize("weights", [False, True], ids=["without weights", "with weights"])
def test_layers_of_attention_cost_their_products_with_and_without_weights(weights: bool, mask: Tensor | None):
    model = Layer(weights, mask).eval()
    graph = lp.trace(model, TOKENS)
    flops = 2 * 7 * (3 * 8 + 4 * 8 * 8 + 8 * 2) + 2 * 2 * 7 * 7 * (4 + 4)
    assert CostModel(graph, "flops").original == count_flops(model, TOKENS).total == flops


def test_channels_that_are_pruned_several_at_a_time_all_count():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(2, 32), nn.Conv2d(32, 5, 1))
    graph = lp.trace(model, IMAGE)
    cost = CostModel(graph, "channels")
    assert (cost.original, cost({"0": 1})) == (32, 16)
    assert graph.groups["0"].channels == 32
    report = lp.prune(model, graph.plan({"0": torch.tensor([1])}))
    assert report.widths == {"0": (32, 16)}
    whole = lp.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 5, 1)), IMAGE)
    assert CostModel(whole, "channels").original == 0
    assert whole.unprunable["0"].channels == 4
