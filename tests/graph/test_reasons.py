"""What the rules say of one operator each: unprunable, not mask-exact or free, with the exact reason or positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine import assert_pruned, difference, random_plan, randomised
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, roi_align

import lightning_prune as lp

IMAGE = torch.zeros(2, 3, 8, 8)
ROWS = torch.zeros(5, 3)
TOKENS = torch.zeros(2, 5, 3)
NUMBERS = torch.tensor([[0, 1, 2], [3, 4, 5]])


class Network(nn.Module):
    """Named layers and parameters, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


class Peek(nn.Module):
    """Looks at values, so that the network is traced on real tensors."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise ValueError("not finite")
        return x


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def around(between: Callable[[Tensor], Tensor], read: int = 8, channels: int = 8) -> Network:
    """Put a function between a convolution that makes channels and one that reads them."""
    layers = {"stem": nn.Conv2d(3, channels, 1), "head": nn.Conv2d(read, 2, 1)}
    return Network(lambda net, x: net.head(between(net.stem(x))), **layers)


def before_linear(between: Callable[[Tensor], Tensor], read: int = 8) -> Network:
    """Put a function between a convolution that makes eight channels and a linear layer that reads them."""
    layers = {"stem": nn.Conv2d(3, 8, 1), "head": nn.Linear(read, 2)}
    return Network(lambda net, x: net.head(between(net.stem(x))), **layers)


def of_rows(between: Callable[..., Tensor], read: int = 8) -> Network:
    """Put a function between two linear layers; it may take more inputs."""
    layers = {"stem": nn.Linear(3, 8), "head": nn.Linear(read, 2)}
    return Network(lambda net, x, *more: net.head(between(net.stem(x), *more)), **layers)


def attending(arrange: Callable[[Tensor], Tensor]) -> Network:
    """Attend with queries, keys and values that are arranged in some way, on real tensors."""

    def run(net: Network, x: Tensor) -> Tensor:
        x = net.peek(x)
        return F.scaled_dot_product_attention(*(arrange(layer(x)) for layer in (net.q, net.k, net.v))).mean((1, 2, 3))

    return Network(run, peek=Peek(), q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 8))


def gated(shape: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let the first channel gate the others."""

    def gate(x: Tensor) -> Tensor:
        first, others = x.split([1, x.shape[1] - 1], 1)
        return torch.cat([first, others * shape(first).sigmoid()], 1)

    return gate


def efficient_channel_attention(net: Network, x: Tensor) -> Tensor:
    x = net.stem(x)
    gate = net.across(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
    return net.head(x * gate[:, :, None, None])


def fixed_blur(net: Network, x: Tensor) -> Tensor:
    x = net.stem(x)
    kernel = torch.ones(1, 1, 3, 3, device=x.device).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, groups=x.shape[1]).flatten(1).mean(1)


def class_token(x: Tensor) -> Tensor:
    return torch.cat([torch.arange(8.0, device=x.device).expand(2, 1, 8), x], 1)


def by_other_strides(x: Tensor) -> Tensor:
    return x.as_strided_(x.shape, (512, 64, 1, 8))


def first_half_by_strides(x: Tensor) -> Tensor:
    return x.as_strided_((2, 4, 8, 8), (256, 64, 8, 1))


def surplus(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, 8:]], 1)


def added_by_number(x: Tensor) -> Tensor:
    numbers = torch.tensor([1, 0, 3, 1, 1], device=x.device)
    return x.new_zeros(4, x.shape[1]).index_add(0, numbers, x)


def at_points(x: Tensor) -> Tensor:
    return x[torch.arange(2, device=x.device), :, torch.tensor([1, 3], device=x.device)].mean(2)


# -- unprunable --------------------------------------------------------------------------------------------------------

UNPRUNABLE: dict[str, tuple[Network, Any, str, str]] = {
    "rows of a table that is also the output layer": (
        Network(
            lambda net, i: net.head(F.linear(net.table(i), net.table.weight)),
            table=nn.Embedding(6, 4),
            head=nn.Linear(6, 2),
        ),
        NUMBERS,
        "table",
        "table: is looked up by number",
    ),
    "plus an input": (of_rows(torch.add), (ROWS, torch.zeros(8)), "stem", "is combined with a tensor of fixed size"),
    "one channel that gates the others": (
        around(gated(lambda gate: gate)),
        IMAGE,
        "stem",
        "is repeated over a tensor of fixed size",
    ),
    "the gate, reshaped": (
        around(gated(lambda gate: gate.reshape(2, 1, -1).view(2, 1, 8, 8))),
        IMAGE,
        "stem",
        "is repeated over a tensor of fixed size",
    ),
    "the gate, without its axis": (
        around(gated(lambda gate: gate.squeeze(1).unsqueeze(1))),
        IMAGE,
        "stem",
        "has one of its channels picked out",
    ),
    "the gate, expanded": (
        around(gated(lambda gate: gate.expand(-1, 7, -1, -1))),
        IMAGE,
        "stem",
        "has one of its channels picked out",
    ),
    "inner side of a factorised grouped kernel": (
        Network(
            lambda net, x: net.head(F.conv2d(x, (net.left @ net.right)[:, :, None, None], groups=3)),
            left=weight(6, 3),
            right=weight(3, 2),
            head=nn.Conv2d(6, 2, 1),
        ),
        torch.zeros(2, 6, 8, 8),
        "right",
        "is the inner side of a grouped convolution",
    ),
    "length of a factorised kernel": (
        Network(
            lambda net, x: net.head(F.conv1d(x, (net.left @ net.right).unsqueeze(1)).mean(2)),
            left=weight(6, 3),
            right=weight(3, 5),
            head=nn.Linear(6, 2),
        ),
        torch.zeros(2, 1, 16),
        "right",
        "is the kernel size of a convolution",
    ),
    "a blur that has no weights": (
        Network(fixed_blur, stem=nn.Conv2d(3, 8, 1)),
        IMAGE,
        "stem",
        "is consumed by a grouped convolution of fixed size",
    ),
    "a convolution over channels, every other of them": (
        Network(
            lambda net, x: net.across(net.stem(x).mean((2, 3)).unsqueeze(1)),
            stem=nn.Conv2d(3, 8, 1),
            across=nn.Conv1d(1, 1, 3, stride=2, padding=1),
        ),
        IMAGE,
        "stem",
        "across: is a spatial axis of a convolution",
    ),
    "a convolution over an image of channels": (
        Network(
            lambda net, x: net.across(net.stem(x).mean((2, 3)).view(-1, 1, 1, net.stem(x).shape[1])).sum(),
            stem=nn.Conv2d(3, 8, 1),
            across=nn.Conv2d(1, 2, 3, padding=1),
        ),
        IMAGE,
        "stem",
        "across: is a spatial axis of a convolution",
    ),
    "times a vector that is given": (
        Network(lambda net, x, v: net.stem(x) @ v, stem=nn.Linear(3, 8)),
        (ROWS, torch.zeros(8)),
        "stem",
        "multiplies a vector of fixed size",
    ),
    "as many matrices as channels": (
        Network(lambda net, x, m: torch.bmm(net.stem(x).transpose(0, 1), m).mean(0), stem=nn.Conv1d(3, 6, 1)),
        (torch.zeros(2, 3, 5), torch.zeros(6, 5, 4)),
        "stem",
        "is a batch of matrices of fixed number",
    ),
    "attention over channels": (
        attending(lambda x: x.transpose(1, 2).unsqueeze(1).contiguous()),
        TOKENS,
        "k",
        "runs safe_softmax along its channels",
    ),
    "heads that are given": (
        Network(
            lambda net, x, k: F.scaled_dot_product_attention(net.q(net.peek(x)), k, k).mean(1),
            peek=Peek(),
            q=nn.Conv2d(3, 4, 1),
        ),
        (IMAGE, torch.zeros(2, 4, 8, 8)),
        "q",
        "is a batch of matrices of fixed number",
    ),
    "other strides": (around(by_other_strides), IMAGE, "stem", "is given strides by hand"),
    "another shape by strides": (around(first_half_by_strides, 4), IMAGE, "stem", "is given strides by hand"),
    "beside numbers": (
        Network(lambda net, x: net.head(class_token(net.stem(x))), stem=nn.Linear(3, 8), head=nn.Linear(8, 2)),
        TOKENS,
        "stem",
        "is put beside a tensor of fixed size",
    ),
    "stacked with an input": (
        of_rows(lambda x, other: torch.stack((x, other), dim=-2)),
        (ROWS, torch.zeros(5, 8)),
        "stem",
        "is put beside a tensor of fixed size",
    ),
    "bilinear pooling": (
        Network(
            lambda net, x: net.head((net.one(x)[:, :, None] * net.other(x)[:, None]).flatten(1)),
            one=nn.Linear(3, 4),
            other=nn.Linear(3, 5),
            head=nn.Linear(20, 2),
        ),
        ROWS,
        "one",
        "has two kinds of channels along one axis",
    ),
    "channels beyond those there are": (around(surplus), IMAGE, "stem", "has none of its channels taken"),
    "points picked before and behind the channels": (
        before_linear(at_points),
        IMAGE,
        "stem",
        "is indexed along several axes",
    ),
    "pooled over channels": (
        of_rows(lambda x: F.adaptive_avg_pool1d(x.unsqueeze(1), 4).squeeze(1), 4),
        ROWS,
        "stem",
        "is a spatial axis that is pooled or resized",
    ),
    "rolled as one long row": (around(lambda x: torch.roll(x, 3)), IMAGE, "stem", "has its channels picked by roll"),
    "sorted along channels": (
        around(lambda x: torch.sort(x, stable=True, dim=-3).values),
        IMAGE,
        "stem",
        "runs sort along its channels",
    ),
    "summed up along channels": (around(lambda x: x.cumsum(dim=1)), IMAGE, "stem", "runs cumsum along its channels"),
    "an axis added in place": (
        of_rows(lambda x: x.unsqueeze_(1)),
        ROWS,
        "stem",
        "runs aten.unsqueeze_, which has no rule",
    ),
    "a parameter that is an output": (
        Network(lambda net, x: net.bias + net.stem(x), stem=nn.Linear(3, 8), bias=weight(8)),
        ROWS,
        "stem",
        "bias: is an output of the network",
    ),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_unprunable_for_exactly_this_reason(case: str):
    model, inputs, name, why = UNPRUNABLE[case]
    graph = lp.trace(model, inputs)
    assert graph.unprunable[name].reason == (why if ": " in why else f"Network: {why}")


def test_the_other_channels_are_free_when_one_is_unprunable():
    graph = lp.trace(around(gated(lambda gate: gate.reshape(2, 1, -1).view(2, 1, 8, 8))), IMAGE)
    assert graph.unprunable["stem"].channels == 1
    assert_pruned(
        randomised(around(gated(torch.clone))),
        IMAGE,
        {"stem": [1, 4]},
        {"stem.weight": {0: [0, 2, 5]}, "stem.bias": {0: [0, 2, 5]}, "head.weight": {1: [0, 2, 5]}},
    )


# -- not mask-exact ----------------------------------------------------------------------------------------------------

TWO_ACTIVATIONS = "Network: sums over the product of two activations"
NOT_ALONE = "reads channels by a weight that cannot be masked alone"
INEXACT: dict[str, tuple[Network, Any, str, str, dict[str, int]]] = {
    "a convolution over channels": (
        Network(
            efficient_channel_attention,
            stem=nn.Conv2d(3, 8, 1),
            across=nn.Conv1d(1, 1, 3, padding=1),
            head=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "stem",
        "across: is convolved with its neighbouring channels",
        {"stem.weight": 0, "stem.bias": 0, "head.weight": 1},
    ),
    "distances": (
        Network(lambda net, x: torch.cdist(net.q(x), net.k(x)), q=nn.Linear(3, 8), k=nn.Linear(3, 8)),
        TOKENS,
        "q",
        "Network: takes distances over its channels",
        {"q.weight": 0, "q.bias": 0, "k.weight": 0, "k.bias": 0},
    ),
    "one number of all channels": (
        Network(lambda net, x: torch.dot(net.stem(x)[0], net.stem(x)[1]), stem=nn.Linear(3, 8)),
        ROWS,
        "stem",
        "Network: is summed up to one number",
        {"stem.weight": 0, "stem.bias": 0},
    ),
    "queries times keys that are never zero": (
        Network(
            lambda net, x: net.q(x).sigmoid() @ net.k(x).exp().transpose(1, 2), q=nn.Linear(3, 8), k=nn.Linear(3, 8)
        ),
        TOKENS,
        "q",
        TWO_ACTIVATIONS,
        {"q.weight": 0, "q.bias": 0, "k.weight": 0, "k.bias": 0},
    ),
    "rows times a vector": (
        Network(lambda net, x: net.q(x) @ net.k(x).mean(0), q=nn.Linear(3, 8), k=nn.Linear(3, 8)),
        ROWS,
        "q",
        TWO_ACTIVATIONS,
        {"q.weight": 0, "q.bias": 0, "k.weight": 0, "k.bias": 0},
    ),
    "a table that is also the output layer": (
        Network(lambda net, i: F.linear(net.table(i), net.table.weight), table=nn.Embedding(6, 8)),
        NUMBERS,
        "table",
        f"table: {NOT_ALONE}",
        {"table.weight": 1},
    ),
    "an autoencoder with one matrix": (
        Network(lambda net, x: F.linear(F.linear(x, net.matrix).relu(), net.matrix.t()), matrix=weight(8, 3)),
        ROWS,
        "matrix",
        f"matrix: {NOT_ALONE}",
        {"matrix": 0},
    ),
    "a matrix and its correction of low rank": (
        Network(
            lambda net, x: F.linear(net.stem(x), net.head.weight + net.left @ net.right),
            stem=nn.Linear(3, 8),
            head=nn.Linear(8, 2, bias=False),
            left=weight(2, 3),
            right=weight(3, 8),
        ),
        ROWS,
        "right",
        f"right: {NOT_ALONE}",
        {"stem.weight": 0, "stem.bias": 0, "head.weight": 1, "right": 1},
    ),
    "queries that are learned": (
        Network(
            lambda net, x: net.q(net.queries) @ net.k(x).transpose(1, 2),
            q=nn.Linear(4, 8),
            k=nn.Linear(3, 8),
            queries=weight(7, 4),
        ),
        TOKENS,
        "q",
        f"q: {NOT_ALONE}",
        {"q.weight": 0, "q.bias": 0, "k.weight": 0, "k.bias": 0},
    ),
    "normalised by the root of the mean square": (
        Network(
            lambda net, x: net.head(net.norm(net.stem(x))),
            stem=nn.Linear(3, 8),
            norm=nn.RMSNorm(8),
            head=nn.Linear(8, 2),
        ),
        TOKENS,
        "stem",
        "norm: is normalised over its channels, fewer of which have other statistics",
        {"stem.weight": 0, "stem.bias": 0, "norm.weight": 0, "head.weight": 1},
    ),
    "read by a normalised weight": (
        Network(
            lambda net, x: net.head(net.stem(x)),
            stem=nn.Conv2d(3, 8, 1),
            head=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 2, 1)),
        ),
        IMAGE,
        "stem",
        "head.parametrizations.weight.0: counts in the norm that a weight is divided by",
        {"stem.weight": 0, "stem.bias": 0, "head.parametrizations.weight.original1": 1},
    ),
}


def buffered(combined: Callable[[Tensor, Tensor], Tensor]) -> Network:
    """Read channels by a parameter that is combined with a buffer."""

    def run(net: Network, x: Tensor) -> Tensor:
        return F.conv2d(net.stem(x), combined(net.weight, net.fixed)[:, :, None, None])

    net = Network(run, stem=nn.Conv2d(3, 8, 1), weight=weight(2, 8))
    net.register_buffer("fixed", torch.zeros(2, 8))
    return net


SHIFTED = "Network: consumes channels by a weight that is not zero where its parameters are"
COMPUTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "exponential": (lambda w, fixed: w.exp(), SHIFTED),
    "one plus": (lambda w, fixed: (1 + w).t().contiguous().t(), SHIFTED),
    "softplus": (lambda w, fixed: 2 * F.softplus(w), SHIFTED),
    "softmax over what it makes": (lambda w, fixed: w.t().softmax(-1).t(), SHIFTED),
    "plus a buffer": (lambda w, fixed: w + fixed, SHIFTED),
    "a buffer plus it": (lambda w, fixed: fixed + w, SHIFTED),
    "of length one, a row each": (lambda w, fixed: w / w.norm(dim=0, keepdim=True), SHIFTED),
    "masked by a buffer": (lambda w, fixed: fixed * w, ""),
    "scaled and bounded": (lambda w, fixed: (w / 3).tanh().clamp(max=1), ""),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_computed_weight_masks_exactly_where_zero_stays_zero(case: str):
    combined, why = COMPUTED[case]
    model = randomised(buffered(combined)).double().eval()
    graph = lp.trace(model, IMAGE.double())
    assert graph.groups["stem"].not_mask_exact == why
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert why or difference(model, graph, random_plan(graph), x) <= 1e-9


@pytest.mark.parametrize("case", INEXACT)
def test_not_mask_exact_for_exactly_this_reason(case: str):
    model, inputs, name, why, axes = INEXACT[case]
    assert lp.trace(model, inputs).groups[name].not_mask_exact == why
    assert_pruned(randomised(model), inputs, {name: [2, 5]}, {tensor: {axis: [2, 5]} for tensor, axis in axes.items()})


# -- free --------------------------------------------------------------------------------------------------------------


def deformable(in_channels: int, out_channels: int, groups: int = 1, offset_groups: int = 1) -> Network:
    return Network(
        lambda net, x: net.head(net.deformable(net.stem(x), net.places(x))),
        stem=nn.Conv2d(3, in_channels, 1),
        places=nn.Conv2d(3, 18 * offset_groups, 1),
        deformable=DeformConv2d(in_channels, out_channels, 3, padding=1, groups=groups),
        head=nn.Conv2d(out_channels, 2, 1),
    )


def bilinear() -> Network:
    return Network(
        lambda net, x: net.head(net.both(net.stem(x), net.other(x)).relu()),
        stem=nn.Linear(3, 8),
        other=nn.Linear(3, 7),
        both=nn.Bilinear(8, 7, 6),
        head=nn.Linear(6, 2),
    )


def put_in_by_number(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_put((torch.tensor([4, 0, 2, 1, 3]),), x)


def partly_convolved(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    first, others = x.split([8, 12], dim=1)
    return torch.cat((convolution(first), others), 1)


STEM = {"stem.weight": {0: [1, 4]}, "stem.bias": {0: [1, 4]}}
FREE: dict[str, tuple[nn.Module, Any, str, dict[str, dict[int, list[int]]]]] = {
    "columns of a table": (
        Network(lambda net, i: net.head(net.table(i)), table=nn.Embedding(6, 8), head=nn.Linear(8, 2)),
        NUMBERS,
        "table",
        {"table.weight": {1: [1, 4]}, "head.weight": {1: [1, 4]}},
    ),
    "rows times a vector of weights": (
        Network(lambda net, x: net.stem(x) @ net.vector, stem=nn.Linear(3, 8), vector=weight(8)),
        ROWS,
        "stem",
        STEM | {"vector": {0: [1, 4]}},
    ),
    "read by a matrix of weights from a vector": (
        Network(lambda net, x: net.matrix @ net.stem(x).mean(0), stem=nn.Linear(3, 8), matrix=weight(6, 8)),
        ROWS,
        "stem",
        STEM | {"matrix": {1: [1, 4]}},
    ),
    "made by a matrix of weights from a vector": (
        Network(lambda net, x: net.head(net.stem @ x), stem=weight(8, 3), head=nn.Linear(8, 2)),
        torch.zeros(3),
        "stem",
        {"stem": {0: [1, 4]}, "head.weight": {1: [1, 4]}},
    ),
    "made by a normalised weight": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        IMAGE,
        "0.parametrizations.weight",
        {f"0.parametrizations.weight.original{i}": {0: [1, 4]} for i in (0, 1)}
        | {"0.bias": {0: [1, 4]}, "2.weight": {1: [1, 4]}},
    ),
    "patches": (
        Network(lambda net, x: net.head(F.unfold(net.stem(x), 2)), stem=nn.Conv2d(3, 8, 1), head=nn.Conv1d(32, 2, 1)),
        IMAGE,
        "stem",
        STEM | {"head.weight": {1: [4, 5, 6, 7, 16, 17, 18, 19]}},
    ),
    "put together from patches": (
        Network(
            lambda net, x: net.head(F.fold(net.stem(x), (4, 4), 2)),
            stem=nn.Conv1d(3, 32, 1),
            head=nn.Conv2d(8, 2, 1),
        ),
        torch.zeros(2, 3, 9),
        "stem",
        {
            "stem.weight": {0: [4, 5, 6, 7, 16, 17, 18, 19]},
            "stem.bias": {0: [4, 5, 6, 7, 16, 17, 18, 19]},
            "head.weight": {1: [1, 4]},
        },
    ),
    "regions": (
        Network(
            lambda net, x: net.head(roi_align(net.stem(x), net.regions, 2)),
            stem=nn.Conv2d(3, 8, 1),
            head=nn.Conv2d(8, 2, 1),
            regions=nn.Parameter(torch.tensor([[0.0, 1, 1, 5, 5], [1, 0, 0, 3, 4]]), requires_grad=False),
        ),
        IMAGE,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "added by number": (
        Network(
            lambda net, x: net.head(added_by_number(net.stem(x))),
            stem=nn.Linear(3, 8),
            head=nn.Linear(8, 2),
        ),
        ROWS,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "put in by number": (
        Network(
            lambda net, x: net.head(
                x.new_zeros(5, net.stem.out_features).index_put((torch.tensor([4, 0, 2, 1, 3]),), net.stem(x))
            ),
            stem=nn.Linear(3, 8),
            head=nn.Linear(8, 2),
        ),
        ROWS,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "looked at by a deformable convolution": (
        Network(
            lambda net, x: net.head(net.deformable(net.stem(x), net.places(x))),
            stem=nn.Conv2d(3, 8, 1),
            places=nn.Conv2d(3, 18, 1),
            deformable=DeformConv2d(8, 6, 3, padding=1),
            head=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        "stem",
        STEM | {"deformable.weight": {1: [1, 4]}},
    ),
    "made by a deformable convolution": (
        Network(
            lambda net, x: net.head(net.stem(x, net.places(x))),
            places=nn.Conv2d(3, 18, 1),
            stem=DeformConv2d(3, 8, 3, padding=1),
            head=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "looked at by a deformable convolution with offsets in groups": (
        deformable(20, 6, offset_groups=4),
        IMAGE,
        "stem",
        {
            "stem.weight": {0: [1, 4, 6, 9, 11, 14, 16, 19]},
            "stem.bias": {0: [1, 4, 6, 9, 11, 14, 16, 19]},
            "deformable.weight": {1: [1, 4, 6, 9, 11, 14, 16, 19]},
        },
    ),
    "a deformable convolution in groups": (
        deformable(16, 24, groups=8),
        IMAGE,
        "stem",
        {
            "stem.weight": {0: [2, 3, 8, 9]},
            "stem.bias": {0: [2, 3, 8, 9]},
            "deformable.weight": {0: [3, 4, 5, 12, 13, 14]},
            "deformable.bias": {0: [3, 4, 5, 12, 13, 14]},
            "head.weight": {1: [3, 4, 5, 12, 13, 14]},
        },
    ),
    "mixed patch by patch": (
        Network(
            lambda net, x: net.head(net.mix(net.stem(x)).relu()),
            stem=nn.Linear(3, 8),
            mix=nn.Conv1d(5, 5, 1),
            head=nn.Linear(8, 2),
        ),
        TOKENS,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "one side of a bilinear layer": (bilinear(), ROWS, "stem", STEM | {"both.weight": {1: [1, 4]}}),
    "the other side of a bilinear layer": (
        bilinear(),
        ROWS,
        "other",
        {"other.weight": {0: [1, 4]}, "other.bias": {0: [1, 4]}, "both.weight": {2: [1, 4]}},
    ),
    "made by a bilinear layer": (
        bilinear(),
        ROWS,
        "both",
        {"both.weight": {0: [1, 4]}, "both.bias": {0: [1, 4]}, "head.weight": {1: [1, 4]}},
    ),
    "repeated to be added": (
        Network(
            lambda net, x: net.head((net.wide(x) + net.stem(x).repeat(1, 2, 1, 1)).relu()),
            wide=nn.Conv2d(3, 16, 1),
            stem=nn.Conv2d(3, 8, 1),
            head=nn.Conv2d(16, 2, 1),
        ),
        IMAGE,
        "wide",
        STEM
        | {
            "wide.weight": {0: [1, 4, 9, 12]},
            "wide.bias": {0: [1, 4, 9, 12]},
            "head.weight": {1: [1, 4, 9, 12]},
        },
    ),
    "one channel repeated to be added": (
        Network(
            lambda net, x: net.head((net.stem(x) + net.one(x).repeat(1, net.stem.out_channels, 1, 1)).relu()),
            stem=nn.Conv2d(3, 8, 1),
            one=nn.Conv2d(3, 1, 1),
            head=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "stem",
        STEM | {"head.weight": {1: [1, 4]}},
    ),
    "made by a convolution of some channels": (
        Network(
            lambda net, x: net.head(partly_convolved(net.stem, net.wide(x)).relu()),
            wide=nn.Conv2d(3, 20, 1),
            stem=nn.Conv2d(8, 8, 1),
            head=nn.Conv2d(20, 2, 1),
        ),
        IMAGE,
        "stem",
        STEM | {"head.weight": {1: [1, 4, *range(8, 20)]}},
    ),
    "one matrix a channel": (
        Network(
            lambda net, x: net.head(torch.bmm(net.stem(x).transpose(0, 1), net.matrices).mean(2).t()),
            stem=nn.Conv1d(3, 8, 1),
            matrices=weight(8, 5, 1),
            head=nn.Linear(8, 2),
        ),
        torch.zeros(2, 3, 5),
        "stem",
        STEM | {"matrices": {0: [1, 4]}, "head.weight": {1: [1, 4]}},
    ),
    "heads": (
        Network(
            lambda net, x: net.head(F.scaled_dot_product_attention(*(part(net.peek(x)) for part in net.parts))),
            peek=Peek(),
            parts=nn.ModuleList(nn.Conv2d(3, 8, 1, bias=False) for _ in range(3)),
            head=nn.Conv2d(8, 2, 1),
        ),
        IMAGE,
        "parts.0",
        {f"parts.{i}.weight": {0: [1, 4]} for i in range(3)} | {"head.weight": {1: [1, 4]}},
    ),
}
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "mean, one axis after the other": (lambda x: x.mean(dim=-1).mean(-1), [1, 4]),
    "sum over a list of axes": (lambda x: x.sum([-1, -2]), [1, 4]),
    "maximum over named axes": (lambda x: x.amax(dim=(-2, 3)), [1, 4]),
    "maximum with its place": (lambda x: x.max(-1).values.max(dim=2, keepdim=True).values.flatten(1), [1, 4]),
    "deviation": (lambda x: torch.std(x, (2, 3), correction=0), [1, 4]),
    "variance, biased by position": (lambda x: torch.var(x.flatten(2), -1, False), [1, 4]),
    "variance and mean": (lambda x: torch.var_mean(x, dim=[2, 3])[0], [1, 4]),
    "norm of named axes": (lambda x: torch.linalg.vector_norm(x, dim=(-1, -2)), [1, 4]),
    "norm, kept": (lambda x: x.norm(dim=(2, 3), keepdim=True).flatten(1), [1, 4]),
    "smallest and largest": (lambda x: torch.aminmax(x.flatten(2), dim=-1)[1], [1, 4]),
    "softmax over pixels": (lambda x: x.flatten(2).softmax(dim=-1).square().sum(-1), [1, 4]),
    "sorted pixels": (lambda x: torch.sort(x.flatten(2), stable=True, dim=2).values[..., 0], [1, 4]),
    "roll by named axes": (lambda x: torch.roll(x, shifts=(1,), dims=(-1,))[..., 0, 0], [1, 4]),
    "flipped": (lambda x: x.flip(-3).mean((2, 3)), [3, 6]),
    "tiled": (lambda x: torch.tile(x, (2, 1, 1)).mean((2, 3)), [1, 4, 9, 12]),
    "repeated": (lambda x: x.mean((2, 3)).repeat_interleave(2, dim=-1), [2, 3, 8, 9]),
    "an axis moved": (lambda x: x.movedim(1, -1).mean((1, 2)), [1, 4]),
    "squeezed": (lambda x: F.adaptive_max_pool2d(x, 1).squeeze((2, -1)), [1, 4]),
    "axes of one added": (lambda x: x.mean((2, 3)).view(2, 1, x.shape[1], 1).flatten(-3), [1, 4]),
    "unbound": (lambda x: torch.stack(x.unbind(-1), dim=1).mean((1, 3)), [1, 4]),
    "indexed in front": (lambda x: x[[1, 0]].mean((2, 3)), [1, 4]),
    "masked in front": (lambda x: x[torch.tensor([True, True])].mean((2, 3)), [1, 4]),
    "masked behind": (lambda x: x[:, :, torch.eye(8, dtype=torch.bool)].mean(2), [1, 4]),
    "indexed behind": (lambda x: x[:, :, [0, 1], [2, 3]].mean(2), [1, 4]),
}
FREE |= {
    name: (before_linear(between, 8 * len(reads) // 2), IMAGE, "stem", STEM | {"head.weight": {1: reads}})
    for name, (between, reads) in BETWEEN.items()
}


@pytest.mark.parametrize("case", FREE)
def test_free_at_these_positions(case: str):
    model, inputs, name, kept = FREE[case]
    model = randomised(model).double().eval()
    inputs = torch.randn(inputs.shape, dtype=torch.float64) if inputs.is_floating_point() else inputs
    assert_pruned(model, inputs, {name: [1, 4]}, kept)
    graph = lp.trace(model, inputs)
    assert graph.groups[name].mask_exact
    for _ in range(2):
        assert difference(model, graph, random_plan(graph), inputs) <= 1e-9


def test_what_rows_are_picked_by_values_does_not_count():
    """Of fewer channels other rows may be picked, which puts the outputs of the network at other places."""

    def run(net: Network, x: Tensor) -> Tensor:
        y = net.head(net.stem(x))
        return y[y[:, 0] > 0].reshape(-1, 1)

    model = Network(run, stem=nn.Linear(3, 8, bias=False), head=nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model.stem.weight.copy_(torch.tensor([-2.0, 1.0]).repeat(4)[:, None])
        model.head.weight.fill_(1)
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0]])
    assert len(model(x)) == 2
    assert list(lp.trace(model, x).groups) == ["stem"]


@pytest.mark.parametrize("between", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Unflatten(1, (-1, 8, 8)))])
def test_two_channels_may_become_one(between: nn.Module):
    read = nn.Linear(128, 4) if isinstance(between, nn.Flatten) else nn.Conv2d(2, 4, 1)
    model = randomised(nn.Sequential(nn.Conv2d(3, 2, 1), between, read))
    columns = list(range(64, 128)) if isinstance(read, nn.Linear) else [1]
    kept = {"0.weight": {0: [1]}, "0.bias": {0: [1]}, "2.weight": {1: columns}}
    assert_pruned(model, IMAGE, {"0": [1]}, kept)
