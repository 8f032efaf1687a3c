"""Networks made at random keep the invariants, whatever they are put together from."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine import counted_flops, difference, random_plan, randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked_twin import draw_pruned, judge, pruned_copy
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.planning.cost import CostModel


class Random(nn.Module):
    """A network of random blocks; each takes the tensors so far and adds one.

    Args:
        seed: What to draw from.
        blocks: Number of blocks.
    """

    def __init__(self, seed: int, blocks: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 1)])
        self.steps: list[tuple] = []
        self.widths = [8]
        self.used: set[int] = set()
        for _ in range(blocks):
            self.draw.choice(self._blocks())()
        # fvcore does not count what nobody reads, so everything is read.
        self.loose = [i for i in range(len(self.widths)) if i not in self.used]
        width = sum(self.widths[i] for i in self.loose)
        self.head = nn.Linear(width * 4, 2) if self.draw.random() < 0.5 else nn.Conv2d(width, 2, 1)
        del self.draw

    def _blocks(self) -> list[Callable[[], None]]:
        return [
            self._convolution, self._convolution, self._grouped, self._depthwise, self._residual, self._concatenate,
            self._gate, self._shuffle, self._excite, self._swap, self._again, self._norm, self._pool,
        ]  # fmt: skip

    def _add(self, step: str, width: int, *args: int, layers: tuple[nn.Module, ...] = ()) -> None:
        reads = args if step in ("layer", "add", "cat") else (-1,)
        self.used.update(at % len(self.widths) for at in reads)
        numbers = [len(self.layers) + i for i in range(len(layers))]
        self.layers.extend(layers)
        self.steps.append((step, *numbers, *args))
        self.widths.append(width)

    def _convolution(self) -> None:
        at, width, size = (
            self.draw.randrange(len(self.widths)),
            self.draw.choice([4, 6, 8, 12]),
            self.draw.choice([1, 3]),
        )
        self._add("layer", width, at, layers=(nn.Conv2d(self.widths[at], width, size, padding=size // 2),))

    def _grouped(self) -> None:
        groups = self.draw.choice([2, 4])
        if self.widths[-1] % groups == 0:
            width = groups * self.draw.choice([1, 2, 3])
            self._add("layer", width, -1, layers=(nn.Conv2d(self.widths[-1], width, 1, groups=groups),))

    def _depthwise(self) -> None:
        width = self.widths[-1] * self.draw.choice([1, 2])
        self._add("layer", width, -1, layers=(nn.Conv2d(self.widths[-1], width, 3, padding=1, groups=self.widths[-1]),))

    def _residual(self) -> None:
        like = [i for i, width in enumerate(self.widths) if width == self.widths[-1]]
        self._add("add", self.widths[-1], self.draw.choice(like), -1)

    def _concatenate(self) -> None:
        parts = [self.draw.randrange(len(self.widths)) for _ in range(self.draw.choice([2, 3]))]
        if sum(self.widths[i] for i in parts) <= 48:
            self._add("cat", sum(self.widths[i] for i in parts), *parts)

    def _gate(self) -> None:
        if self.widths[-1] % 2 == 0:
            self._add("gate", self.widths[-1] // 2)

    def _shuffle(self) -> None:
        if self.widths[-1] % 2 == 0:
            self._add("shuffle", self.widths[-1])

    def _swap(self) -> None:
        parts = self.draw.choice([2, 3])
        if self.widths[-1] % parts == 0:
            self._add("swap", self.widths[-1], parts)

    def _excite(self) -> None:
        width = self.widths[-1]
        self._add("excite", width, layers=(nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)))

    def _again(self) -> None:
        known = [i for i, layer in enumerate(self.layers) if isinstance(layer, nn.Conv2d) and layer.groups == 1]
        known = [i for i in known if self.layers[i].in_channels == self.widths[-1]]
        if known:
            number = self.draw.choice(known)
            self.steps.append(("layer", number, -1))
            self.used.add(len(self.widths) - 1)
            self.widths.append(self.layers[number].out_channels)

    def _norm(self) -> None:
        width = self.widths[-1]
        norms = [nn.BatchNorm2d(width), nn.PReLU(width), nn.InstanceNorm2d(width, affine=True)]
        if width % 2 == 0:
            norms.append(nn.GroupNorm(2, width))
        self._add("layer", width, -1, layers=(self.draw.choice(norms),))

    def _pool(self) -> None:
        self._add("pool", self.widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.layers[0](x)]
        for step, *args in self.steps:
            seen.append(getattr(self, f"_run_{step}")(seen, *args))
        x = torch.cat([F.adaptive_avg_pool2d(seen[i], 2) for i in self.loose], 1)
        return self.head(x.flatten(1) if isinstance(self.head, nn.Linear) else x)

    def _run_layer(self, seen: list[Tensor], number: int, at: int) -> Tensor:
        return torch.tanh(self.layers[number](seen[at]))

    def _run_add(self, seen: list[Tensor], first: int, second: int) -> Tensor:
        return seen[first] + seen[second]

    def _run_cat(self, seen: list[Tensor], *parts: int) -> Tensor:
        return torch.cat([seen[i] for i in parts], 1)

    def _run_gate(self, seen: list[Tensor]) -> Tensor:
        first, second = seen[-1].chunk(2, 1)
        return first * second.sigmoid()

    def _run_shuffle(self, seen: list[Tensor]) -> Tensor:
        n, c, h, w = seen[-1].shape
        return seen[-1].view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def _run_swap(self, seen: list[Tensor], parts: int) -> Tensor:
        return torch.cat(seen[-1].chunk(parts, 1)[::-1], 1)

    def _run_excite(self, seen: list[Tensor], down: int, up: int) -> Tensor:
        return seen[-1] * self.layers[up](torch.relu(self.layers[down](seen[-1].mean((2, 3), keepdim=True)))).sigmoid()

    def _run_pool(self, seen: list[Tensor]) -> Tensor:
        return F.max_pool2d(seen[-1], 3, 1, 1)


def standardised(w: Tensor) -> Tensor:
    rows = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(rows, None, None, training=True).reshape_as(w)


def standardised_by_hand(w: Tensor) -> Tensor:
    variance, mean = torch.var_mean(w, (1, 2, 3), correction=0, keepdim=True)
    return (w - mean) / (variance + 1e-5).sqrt()


# Weights that are computed from a weight, as convolutions and parametrizations of many libraries do it.
COMPUTED: list[Callable[[Tensor], Tensor]] = [
    standardised,
    standardised_by_hand,
    lambda w: F.normalize(w.flatten(1), dim=1).view_as(w),
    lambda w: F.normalize(w, dim=0),
    lambda w: F.layer_norm(w, w.shape[1:]),
    lambda w: F.layer_norm(w, w.shape[2:]),
    lambda w: F.group_norm(w, 1),
    lambda w: F.group_norm(w, w.shape[1]),
    lambda w: F.instance_norm(w),
    lambda w: F.batch_norm(w, None, None, training=True),
    lambda w: F.batch_norm(w.transpose(0, 1), None, None, training=True).transpose(0, 1),
    lambda w: F.rms_norm(w, w.shape[1:]),
    lambda w: F.rms_norm(w, w.shape[2:]),
    lambda w: w / w.abs().amax((1, 2, 3), keepdim=True),
    lambda w: w / w.norm(),
    lambda w: w - w.mean(0, keepdim=True),
    lambda w: w - w.mean((2, 3), keepdim=True),
    lambda w: w * w.sigmoid(),
    lambda w: w + w.flip(2, 3),
    lambda w: w + 1,
    lambda w: w.exp().softmax(1),
    lambda w: w.tanh().round(decimals=1),
]


class Computed(nn.Conv2d):
    """A convolution whose weight is computed from its parameter."""

    def __init__(self, width: int, out: int, computed: int) -> None:
        super().__init__(width, out, 3, padding=1)
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, COMPUTED[self.computed](self.weight), self.bias, padding=1)


class Scaled(nn.Conv2d):
    """A convolution with a learned gain of each channel that it makes or takes in."""

    def __init__(self, width: int, out: int, axis: int) -> None:
        super().__init__(width, out, 1)
        shape = [1, 1, 1, 1]
        shape[axis] = self.weight.shape[axis]
        self.gain = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias)


class Factorised(nn.Module):
    """A convolution that is a product of two matrices, plus a third one perhaps."""

    def __init__(self, width: int, out: int, has_sum: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(out, 5)), nn.Parameter(torch.zeros(5, width))
        self.more = nn.Parameter(torch.zeros(out, width)) if has_sum else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.left @ self.right
        if self.more is not None:
            weight = weight + self.more
        return F.conv2d(x, weight[:, :, None, None])


class Along(nn.Module):
    """A module that sees the axes of images in another order."""

    def __init__(self, module: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.axes = module, axes

    def forward(self, x: Tensor) -> Tensor:
        back = sorted(range(4), key=self.axes.__getitem__)
        return self.module(x.permute(self.axes)).permute(back)


class RandomComputed(Random):
    """A random network with normalisations over any axes, shared weights and weights computed from weights."""

    def _blocks(self) -> list[Callable[[], None]]:
        plain = [self._convolution, self._residual, self._concatenate, self._again, self._norm]
        return plain + 2 * [self._computed, self._scaled, self._factorised, self._along, self._same_weight]

    def _layer(self, made: Callable[[int, int], nn.Module]) -> None:
        at, width = self.draw.randrange(len(self.widths)), self.draw.choice([4, 6, 8])
        self._add("layer", width, at, layers=(made(self.widths[at], width),))

    def _computed(self) -> None:
        number = self.draw.randrange(len(COMPUTED))
        self._layer(lambda width, out: Computed(width, out, number))

    def _scaled(self) -> None:
        axis = self.draw.randrange(2)
        self._layer(lambda width, out: Scaled(width, out, axis))

    def _factorised(self) -> None:
        has_sum = self.draw.random() < 0.5
        self._layer(lambda width, out: Factorised(width, out, has_sum))

    def _along(self) -> None:
        axes = self.draw.choice([(0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (1, 0, 2, 3), (2, 1, 0, 3)])
        width = self.widths[-1]
        size = (2, width, 6, 6)[axes[1]]
        last = (2, width, 6, 6)[axes[3]]
        norm = self.draw.choice([
            nn.BatchNorm2d(size), nn.BatchNorm2d(size, track_running_stats=False), nn.GroupNorm(1, size),
            nn.GroupNorm(2, size), nn.GroupNorm(size, size), nn.InstanceNorm2d(size, affine=True), nn.LayerNorm(last),
            nn.InstanceNorm2d(size, track_running_stats=True), nn.LocalResponseNorm(3), nn.RMSNorm(last),
        ])  # fmt: skip
        self._add("layer", width, -1, layers=(Along(norm, axes),))

    def _same_weight(self) -> None:
        """Add a convolution that has the weight of another one, but a bias of its own."""
        known = [one for one in self.layers if type(one) in (nn.Conv2d, Computed, Scaled) and one.groups == 1]
        known = [one for one in known if one.in_channels == self.widths[-1]]
        if known:
            first = self.draw.choice(known)
            other = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size, padding=first.padding)
            other.weight = first.weight
            self._add("layer", first.out_channels, -1, layers=(other,))


def check(seed: int, blocks: int) -> int:
    """Check one network; returns how many groups it has."""
    torch.manual_seed(seed)
    model = randomised(Random(seed, blocks)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = lp.trace(model, x)
    plan = random_plan(graph, exact_only=True)
    assert difference(model, graph, plan, x) <= 1e-9
    cost = CostModel(graph, "flops")
    assert cost.original == counted_flops(model, x)
    plan = random_plan(graph)
    lp.prune(model, plan)
    assert cost(plan.widths) == counted_flops(model, x)
    assert CostModel(graph, "params")(plan.widths) == sum(p.numel() for p in model.parameters())
    model.train()(x).sum().backward()
    assert lp.trace(model, x).groups == graph.groups
    return len(graph.groups)


def check_computed(seed: int, blocks: int) -> int:
    """Check one network against its masked twins, all groups and each alone; returns how many are mask-exact."""
    torch.manual_seed(seed)
    model = randomised(RandomComputed(seed, blocks)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = lp.trace(model, x)
    exact = [name for name, group in graph.groups.items() if group.mask_exact and group.size > group.least]
    for names in (exact, *([name] for name in exact)):
        pruned = draw_pruned(graph, names)
        for mode in (True, False):  # none of these draws random numbers in training
            assert judge(copy.deepcopy(model).train(mode), graph, pruned, x).apart <= 1e-9, names
    smaller = pruned_copy(model, graph, draw_pruned(graph, list(graph.groups)))
    smaller(x)
    smaller.train()(x).sum().backward()
    return len(exact)


_SEEDS = {"seed": st.integers(0, 2**32), "blocks": st.integers(1, 12)}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(**_SEEDS)
def test_random_networks(seed: int, blocks: int):
    check(seed, blocks)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(**_SEEDS)
def test_random_networks_of_computed_weights(seed: int, blocks: int):
    check_computed(seed, blocks)


@pytest.mark.long
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(**_SEEDS)
def test_many_random_networks(seed: int, blocks: int):
    check(seed, blocks)


@pytest.mark.long
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(**_SEEDS)
def test_many_random_networks_of_computed_weights(seed: int, blocks: int):
    check_computed(seed, blocks)


def test_most_random_networks_can_be_pruned():
    assert sum(check(seed, 8) > 0 for seed in range(10)) >= 9
