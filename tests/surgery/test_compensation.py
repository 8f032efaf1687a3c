"""Compensation: what is kept makes up for what is pruned, as well as least squares on explicit windows can."""

import copy
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine import random_plan, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import lightning_prune as lp
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PlannedGroup, PruningPlan, Slice, plan_in_force
from lightning_prune.surgery.compensation import compensating, least_squares, normalisation
from lightning_prune.surgery.compensation.inputs import wide_blocks
from lightning_prune.surgery.compensation.least_squares import Moments
from lightning_prune.surgery.compensation.operators import READ_CALL, as_matrix, from_matrix
from lightning_prune.surgery.compensation.sampling import Places

METHODS = ["fold", "refit"]


class Block(nn.Module):
    """A residual block, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.n = nn.BatchNorm2d(outputs)
        self.b = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.m = nn.BatchNorm2d(outputs)
        self.d = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.d = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.m(self.b(F.leaky_relu(self.n(self.a(x))))) + self.d(x))


class PreActivation(nn.Module):
    """Normalisation behind a concatenation, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.n = nn.BatchNorm2d(14)
        self.c = nn.Conv2d(14, 4, 3)
        self.f = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        joined = torch.cat([first, self.b(first).relu()], 1)
        return self.f(self.c(self.n(joined).relu()).mean((2, 3)))


class Functional(nn.Module):
    """Layers without modules, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(8, 3, 3, 3))
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Parameter(torch.zeros(5, 8 * 36))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.conv2d(x, self.first, padding=1, stride=2))
        x = F.leaky_relu(self.again(F.leaky_relu(self.again(x))))
        return F.linear(x.flatten(1), self.last)


def sequential(*layers: Any) -> nn.Sequential:
    return nn.Sequential(*layers)


NETWORKS = {
    "residual": (
        lambda: sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.3), Block(8, 8, 1), Block(8, 12, 2),
            Block(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        ),
        (3, 12, 12),
    ),
    "geometry": (
        lambda: sequential(
            nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.LeakyReLU(0.3),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Tanh(),
            nn.Conv2d(8, 8, 3, groups=4), nn.LeakyReLU(0.3),
            nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, stride=2),
            nn.Flatten(), nn.Linear(6 * 100, 4),
        ),
        (3, 12, 12),
    ),
    "one axis": (
        lambda: sequential(
            nn.Conv1d(3, 8, 3, padding=1), nn.LeakyReLU(0.3), nn.Conv1d(8, 6, 5, stride=2, bias=False),
            nn.LeakyReLU(0.3),
            nn.Conv1d(6, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 8, 2),
        ),
        (3, 20),
    ),
    "three axes": (
        lambda: sequential(
            nn.Conv3d(2, 6, 3, padding=1), nn.LeakyReLU(0.3), nn.Conv3d(6, 6, 3, dilation=2, padding=(1, 0, 2)),
            nn.LeakyReLU(0.3),
            nn.ConvTranspose3d(6, 4, 2, stride=2), nn.LeakyReLU(0.3), nn.Conv3d(4, 2, 3),
        ),
        (2, 6, 6, 6),
    ),
    "depthwise": (
        lambda: sequential(
            nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Softplus(),
            nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.Softplus(),
            nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1),
        ),
        (3, 8, 8),
    ),
    "tokens": (lambda: sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.Linear(8, 3)), (7, 5)),
    "normalised after concatenation": (PreActivation, (3, 8, 8)),
    "functional": (Functional, (3, 12, 12)),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = NETWORKS[name]
    return randomised(build().double()).eval(), torch.randn(48, *shape, dtype=torch.float64)


def halved(graph: ChannelGraph) -> PruningPlan:
    return graph.plan({name: torch.randperm(group.size)[: group.size // 2] for name, group in graph.groups.items()})


@torch.no_grad()
def with_repeated_channels(graph: ChannelGraph) -> PruningPlan:
    """Make the channels that a plan prunes repeat kept ones, whatever lies between; return the plan."""
    tensors = graph.model.state_dict()
    plan = halved(graph)
    for name, planned in plan.groups.items():
        pruned, kept = planned.pruned, planned.channels
        repeated = kept[torch.randint(len(kept), (len(pruned),))]
        group = graph.groups[name]
        for one in group.out_slices + group.other_slices:
            tensor = tensors[one.tensor]
            rows = tensor.index_select(one.axis, one.positions(repeated))
            tensor.index_copy_(one.axis, one.positions(pruned), rows)
    return plan


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, x: Any) -> float:
    """Return the greatest difference of outputs, relative to the greatest output."""
    pairs = zip(tree_leaves(model(x)), tree_leaves(other(x)), strict=True)
    return max(float((left - right).abs().max() / right.abs().max()) for left, right in pairs)


def pruned(model: nn.Module, plan: PruningPlan, method: str, x: Tensor, size: int = 16) -> nn.Module:
    smaller = copy.deepcopy(model)
    lp.prune(smaller, plan, compensate=method, batches=x.split(size))
    return smaller


# -- exact recovery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_that_repeat_others_are_pruned_without_a_trace(name: str, method: str):
    model, x = network(name)
    graph = lp.trace(model, x[:1])
    plan = with_repeated_channels(graph)
    assert error(pruned(model, plan, "none", x), model, x) > 1e-2
    smaller = pruned(model, plan, method, x)
    assert error(smaller, model, x) < 1e-9
    fresh = torch.randn_like(x)
    assert error(smaller, model, fresh) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_channels_that_are_mixtures_of_others_are_pruned_without_a_trace(method: str, bias: bool):
    model = randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, stride=2, bias=bias), nn.Tanh(),
            nn.Conv2d(6, 2, 2, bias=bias),
        ).double()
    ).eval()  # fmt: skip
    kept = torch.tensor([0, 2, 3, 5, 6])
    others = torch.tensor([1, 4, 7])
    mixture = torch.randn(3, 5, dtype=torch.float64)
    norm = model[1]
    with torch.no_grad():
        norm.running_var[others] = 1 - norm.eps
        norm.running_mean[others] = 0
        scale = norm.weight[kept] / (norm.running_var[kept] + norm.eps).sqrt()
        shift = norm.bias[kept] - scale * norm.running_mean[kept]
        norm.weight[others] = 1
        model[0].weight[others] = torch.einsum("rk,k...->r...", mixture * scale, model[0].weight[kept])
        norm.bias[others] = mixture @ shift
        if bias:
            model[0].bias[others] = mixture * scale @ model[0].bias[kept]
    x = torch.randn(32, 3, 12, 12, dtype=torch.float64)
    graph = lp.trace(model, x[:1])
    smaller = pruned(model, graph.plan({"0": kept}), method, x)
    assert error(smaller, model, x) < 1e-9


# -- against naive solutions -------------------------------------------------------------------------------------------


def explicit_windows(x: np.ndarray, kernel: int, stride: int, padding: int) -> np.ndarray:
    """Return (positions of all images, channels * kernel * kernel), one window after the other."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    rows = []
    for image in x:
        for top in range(0, x.shape[2] - kernel + 1, stride):
            for left in range(0, x.shape[3] - kernel + 1, stride):
                window = image[:, top : top + kernel, left : left + kernel]
                rows.append(window.reshape(-1))
    return np.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_a_refit_is_least_squares_on_explicit_windows(stride: int, padding: int, bias: bool):
    conv = nn.Conv2d(8, 5, 3, stride=stride, padding=padding, bias=bias)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), conv).double()).eval()
    x = torch.randn(60, 3, 9, 9, dtype=torch.float64)
    kept = torch.tensor([0, 2, 5, 7])
    smaller = pruned(model, lp.trace(model, x[:1]).plan({"0": kept}), "refit", x)
    with torch.no_grad():
        inputs = model[:2](x)[:, kept].numpy()
        wanted = model(x).movedim(1, -1).reshape(-1, 5).numpy()
        found = smaller(x).movedim(1, -1).reshape(-1, 5).numpy()
    windows = explicit_windows(inputs, 3, stride, padding)
    if bias:
        windows = np.concatenate([windows, np.ones((len(windows), 1))], 1)
    solution, *_ = np.linalg.lstsq(windows, wanted, rcond=None)
    least = np.square(windows @ solution - wanted).sum()
    assert np.square(found - wanted).sum() < 1.001 * least
    np.testing.assert_allclose(smaller[2].weight.detach().reshape(5, -1), solution[:36].T, atol=0.02)


def test_a_fold_is_least_squares_between_channels():
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).double()).eval()
    x = torch.randn(60, 3, 7, 7, dtype=torch.float64)
    kept, others = torch.tensor([0, 2, 5, 7]), torch.tensor([1, 3, 4, 6])
    smaller = pruned(model, lp.trace(model, x[:1]).plan({"0": kept}), "fold", x)
    with torch.no_grad():
        channels = model[:2](x).movedim(1, -1).reshape(-1, 8).numpy()
    ones = np.ones((len(channels), 1))
    solution, *_ = np.linalg.lstsq(np.concatenate([channels[:, kept], ones], 1), channels[:, others], rcond=None)
    weight = model[2].weight.detach()
    expected = weight[:, kept] + torch.einsum("orhw,kr->okhw", weight[:, others], torch.from_numpy(solution[:4]))
    constant = torch.einsum("orhw,r->o", weight[:, others], torch.from_numpy(solution[4]))
    torch.testing.assert_close(smaller[2].weight.detach(), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(smaller[2].bias.detach(), model[2].bias.detach() + constant, atol=2e-2, rtol=0)


def test_statistics_follow_what_is_normalised():
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5)).double()).eval()
    x = torch.randn(30, 3, 7, 7, dtype=torch.float64)
    smaller = pruned(model, lp.trace(model, x[:1]).plan({"0": torch.tensor([0, 2, 5, 7])}), "statistics", x)
    with torch.no_grad():
        before, after = model[:2](x), smaller[:2](x)
    assert torch.equal(smaller[1].weight, model[1].weight[:, [0, 2, 5, 7]])
    mean = model[2].running_mean + after.mean((0, 2, 3)) - before.mean((0, 2, 3))
    torch.testing.assert_close(smaller[2].running_mean, mean)
    ratio = after.var((0, 2, 3), correction=0) / before.var((0, 2, 3), correction=0)
    torch.testing.assert_close(smaller[2].running_var, model[2].running_var * ratio, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.Conv1d(4, 6, 4, padding="same"),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), groups=2),
        nn.Conv2d(4, 6, 3, padding="valid", bias=False),
        nn.Conv3d(4, 6, 2, padding=1, dilation=(1, 2, 1)),
        nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=2, dilation=2),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2, bias=False),
        nn.ConvTranspose3d(4, 6, 2, stride=2),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_windows_times_the_weight_are_the_output(layer: Any):
    layer = layer.double()
    rank = layer.weight.dim() - 2
    x = torch.randn(3, 4, *(7, 6, 5)[:rank], dtype=torch.float64)
    calls = []
    if rank == 0:
        x = x[:, None, None].expand(3, 2, 5, 4)
        calls.append(READ_CALL[F.linear](x, layer.weight, layer.bias))
    elif layer.transposed:
        settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        calls.append(READ_CALL[getattr(F, f"conv_transpose{rank}d")](x, layer.weight, layer.bias, *settings))
    else:
        settings = layer.stride, layer.padding, layer.dilation, layer.groups
        calls.append(READ_CALL[getattr(F, f"conv{rank}d")](x, layer.weight, layer.bias, *settings))
    [call] = calls
    output = call.shaped(layer(x).detach())
    positions = output.shape[2:].numel()
    index = torch.arange(3 * positions)
    windows = call.windows(Places(index // positions, index % positions), output.shape[2:])
    matrix = as_matrix(layer.weight.detach(), call.groups, call.transposed)
    by_group = windows.unflatten(2, (call.groups, -1)).permute(2, 0, 1, 3).flatten(2)
    found = torch.bmm(by_group, matrix.mT).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        found = found + layer.bias
    wanted = output.flatten(2).transpose(1, 2).reshape(-1, output.shape[1])
    torch.testing.assert_close(found, wanted, check_dtype=True)
    assert torch.equal(from_matrix(matrix, layer.weight, call.groups, call.transposed), layer.weight)


# -- what does not change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_changes_where_nothing_is_pruned_before(name: str, method: str):
    model, x = network(name)
    graph = lp.trace(model, x[:1])
    last = list(graph.groups)[-1]
    size = graph.groups[last].size
    plan = graph.plan({last: torch.arange(size // 2)})
    smaller = pruned(model, plan, method, x)
    plain = pruned(model, plan, "none", x)
    consuming = {one.tensor.rpartition(".")[0] for one in graph.groups[last].in_slices}
    names = list(plain.state_dict())
    behind = min(index for index, key in enumerate(names) if key.rpartition(".")[0] in consuming)
    for key in names[:behind]:
        assert torch.equal(smaller.state_dict()[key], plain.state_dict()[key]), key
    unpruned = pruned(model, graph.plan({name: torch.arange(g.size) for name, g in graph.groups.items()}), method, x)
    for key, value in model.state_dict().items():
        assert torch.equal(unpruned.state_dict()[key], value)


def test_the_model_is_as_it_was_but_for_the_prune():
    model, x = network("residual")
    model.train()
    model[3].eval()
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    parameters = list(model.parameters())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    graph = lp.trace(model, x[:1])
    lp.prune(model, halved_by_order(graph), compensate="refit", batches=x.split(16))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert len(model._forward_hooks) == 1
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    model(x).sum().backward()


def halved_by_order(graph: ChannelGraph) -> PruningPlan:
    return graph.plan({name: torch.arange(group.size // 2) for name, group in graph.groups.items()})


@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
def test_the_same_bits_come_out_each_time(method: str):
    model, x = network("residual")
    plan = halved(lp.trace(model, x[:1]))
    first, second = (pruned(model, plan, method, x) for _ in range(2))
    for left, right in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_nothing_is_pruned_if_compensation_fails():
    model, x = network("residual")
    before = copy.deepcopy(model.state_dict())
    graph = lp.trace(model, x[:1])
    wrong_last = [*x.split(16), torch.zeros(4, 5, 2, 2, dtype=torch.float64)]
    for batches in (wrong_last, [], [torch.full_like(x, torch.nan)]):
        with pytest.raises((RuntimeError, ValueError)):
            lp.prune(model, halved(graph), compensate="refit", batches=batches)
        assert plan_in_force(model) is None
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="one of none, statistics, fold, refit; got 'redo'"):
        lp.prune(model, halved(graph), compensate="redo", batches=[x])
    with pytest.raises(ValueError, match="give `batches`"):
        lp.prune(model, halved(graph), compensate="refit")


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_report_tells_errors_and_what_is_not_compensated():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 12)
            self.product = nn.Parameter(torch.zeros(12, 6))
            self.last = nn.Linear(12, 12)
            self.other = nn.Linear(12, 12)
            self.other.weight = self.last.weight

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.first(x).relu()
            return x @ self.product, self.last(x), self.other(x)

    model = randomised(Tied().double()).eval()
    x = torch.randn(32, 5, 4, dtype=torch.float64)
    graph = lp.trace(model, x[:1])
    assert set(graph.groups) == {"first"}
    report = lp.prune(model, graph.plan({"first": torch.arange(6)}), compensate="refit", batches=[x]).compensation
    assert report.errors == {}
    assert set(report.not_compensated) == {"product", "last.weight"}
    assert "several modules share it" in report.not_compensated["last.weight"]
    assert "product: not compensated, because" in str(report)


class Tokens(nn.Module):
    """A transformer of torch's own parts on patches of an image, with a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.zeros(17, 16))
        self.blocks = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block, norm in zip(self.blocks, self.norms, strict=True):
            y = norm(x)
            x = x + block(y, y, y, need_weights=False)[0]
        return self.head(x[:, 0])


@pytest.mark.parametrize("kind", ["heads", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_attention_of_torch_makes_up_for_heads_and_values(kind: str, method: str):
    """Values that others of the same head repeat leave without a trace, and so do heads that repeat others."""
    model = randomised(Tokens().double()).eval()
    x = torch.randn(48, 3, 8, 8, dtype=torch.float64)
    graph = lp.trace(model, x[:1])
    names = [name for name, group in graph.groups.items() if group.kind == kind]
    plan = graph.plan({name: torch.arange(2) for name in names})
    with torch.no_grad():
        for block in model.blocks:
            for weights in block.in_proj_weight, block.in_proj_bias:
                of_heads = weights.unflatten(0, (3, 4, 4))  # queries, keys and values; heads; their widths
                if kind == "heads":
                    of_heads[:, 2:] = of_heads[:, :2]
                else:
                    of_heads[2, :, 2:] = of_heads[2, :, :2]
    whole = model(x)
    assert error(pruned(model, plan, "none", x), model, x) > 1e-2
    smaller = copy.deepcopy(model)
    report = lp.prune(smaller, plan, compensate=method, batches=x.split(16)).compensation
    assert report.not_compensated == {}
    assert (smaller(x) - whole).abs().max() < 1e-9 * whole.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_attention_of_torch_makes_up_for_its_stream(method: str):
    model = randomised(Tokens()).eval()
    x = torch.randn(256, 3, 8, 8)
    plan = halved(lp.trace(model, x[:1]))
    smaller = copy.deepcopy(model)
    report = lp.prune(smaller, plan, compensate=method, batches=x.split(64)).compensation
    assert report.not_compensated == {}
    assert {"blocks.0.in_proj_weight", "blocks.1.out_proj.weight"} <= set(report.errors)
    if method == "refit":
        assert error(smaller, model, x) < 0.8 * error(pruned(model, plan, "none", x), model, x)


def test_computed_weights_that_consume_pruned_channels_are_told():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(6, 16)), nn.ReLU(), norm(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    graph = lp.trace(model, x)
    report = lp.prune(model, halved(graph), compensate="refit", batches=[x]).compensation
    assert set(report.not_compensated) == {"2.parametrizations.weight.original1"}
    assert set(report.errors) == {"4.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_relative_to_the_variance_of_outputs(method: str):
    model = randomised(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double()).eval()
    x = torch.randn(256, 6, dtype=torch.float64)
    smaller = copy.deepcopy(model)
    plan = lp.trace(model, x[:1]).plan({"0": torch.arange(5)})
    report = lp.prune(smaller, plan, compensate=method, batches=[x]).compensation
    with torch.no_grad():
        apart = smaller(x) - model(x)
        share = apart.square().mean(0).sum() / model(x).var(0, correction=0).sum()
    told = report.errors["2.weight"]
    assert told.after == pytest.approx(float(share), rel=1e-6)
    assert told.after < told.before


# -- any module tree ---------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """What runs first depends on the batch, what is written down is read later, and inputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.small = nn.Linear(12, 12)
        self.large = nn.Linear(12, 12)
        self.last = nn.Linear(24, 3)
        self.notes: dict[str, Tensor] = {}

    def forward(self, x: Tensor, *, scale: float) -> dict[str, Tensor]:
        self.notes["first"] = self.first(x).relu()
        for name in ("small", "large") if scale < 1 else ("large", "small"):
            self.notes[name] = getattr(self, name)(self.notes["first"]).relu() * scale
        return {"out": self.last(torch.cat([self.notes["small"], self.notes["large"]], -1))}


def test_each_batch_finds_what_it_has_written_down_and_goes_in_its_own_order():
    model = randomised(Branching().double()).eval()
    batches = [{"x": torch.randn(40, 4, dtype=torch.float64), "scale": scale} for scale in (0.5, 2.0, 0.5, 2.0)]
    graph = lp.trace(model, batches[0], ignore=["small", "large"])
    smaller = copy.deepcopy(model)
    report = lp.prune(smaller, graph.plan({"first": torch.arange(8)}), compensate="refit", batches=batches).compensation
    assert set(report.errors) == {"small.weight", "large.weight", "last.weight"}
    plain = copy.deepcopy(model)
    lp.prune(plain, graph.plan({"first": torch.arange(8)}))
    for batch in batches:
        with torch.no_grad():
            wanted = model(**batch)["out"]
            assert (smaller(**batch)["out"] - wanted).norm() < 0.7 * (plain(**batch)["out"] - wanted).norm()


def test_batches_may_come_once_and_a_function_may_run_them():
    model, x = network("tokens")
    plan = halved(lp.trace(model, x[:1]))
    expected = pruned(model, plan, "fold", x)
    smaller = copy.deepcopy(model)
    labelled = ((part, 0) for part in x.split(16))
    lp.prune(smaller, plan, compensate="fold", batches=labelled, run=lambda model, batch: model(batch[0]))
    for left, right in zip(smaller.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_can_be_pruned_and_compensated_twice(method: str):
    model, x = network("geometry")
    graph = lp.trace(model, x[:1])
    first = with_repeated_channels(graph)
    once = pruned(model, first, method, x)
    second = {name: group.channels[: max(1, len(group.kept) - 1)] for name, group in first.groups.items()}
    again = graph.plan(second)
    twice = pruned(once, again, method, x)
    plain = pruned(once, again, "none", x)
    assert error(twice, once, x) < error(plain, once, x)


def test_layers_make_up_for_what_is_missing_in_their_stream(monkeypatch: pytest.MonkeyPatch):
    from lightning_prune.surgery.compensation import survey

    blocks = [Block(12, 12, 1) for _ in range(3)]
    model = randomised(nn.Sequential(nn.Conv2d(3, 12, 3), nn.LeakyReLU(), *blocks, nn.Conv2d(12, 4, 3)).double())
    x = torch.randn(96, 3, 10, 10, dtype=torch.float64)
    plan = halved(lp.trace(model, x[:1]))
    kept = plan.groups["0"].channels
    with torch.no_grad():
        wanted = model.eval()[:5](x)[:, kept]

        def missing() -> float:
            return float((pruned(model, plan, "refit", x)[:5](x) - wanted).square().mean())

        aware = missing()
        monkeypatch.setattr(survey, "_SUMS", set())
        assert aware < 0.95 * missing()


def test_batches_join_when_there_is_room(monkeypatch: pytest.MonkeyPatch):
    from lightning_prune.surgery.compensation import survey

    model, x = network("residual")
    plan = with_repeated_channels(lp.trace(model, x[:1]))
    monkeypatch.setattr(survey, "ACTIVATIONS", 3 * 8 * 16 * 2 * 12 * 6 * 6 + 1)  # one batch at first, all at the end
    smaller = copy.deepcopy(model)
    report = lp.prune(smaller, plan, compensate="refit", batches=x.split(16))
    assert report.compensation.batches == 3
    assert error(smaller, model, x) < 1e-9


# -- many plans --------------------------------------------------------------------------------------------------------


def squared(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """Measure a network by what it returns."""
    return model(*batch).square().mean(), 0.0


@torch.no_grad()
def assert_candidates_are_compensated_as_copies(name: str, seen: int) -> None:
    model, x = network(name)
    graph = lp.trace(model, x[:1])
    plans = [halved(graph), random_plan(graph)]
    batches = [(part,) for part in x.split(seen)]
    measured = evaluate_candidates(
        graph, plans, [(x,)], evaluate=squared, compensate="fold", compensate_batches=batches
    )
    for plan, loss in zip(plans, measured.loss, strict=True):
        copied = copy.deepcopy(model)
        lp.prune(copied, plan, compensate="fold", batches=x.split(seen))
        torch.testing.assert_close(loss, copied(x).square().mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_candidates_are_compensated_as_copies_are(name: str):
    assert_candidates_are_compensated_as_copies(name, seen=20)


def test_candidates_are_compensated_as_copies_are_where_batches_join_later(monkeypatch: pytest.MonkeyPatch):
    from lightning_prune.surgery.compensation import survey

    monkeypatch.setattr(survey, "ACTIVATIONS", 3 * 8 * 16 * 2 * 12 * 12 * 12 + 1)  # one batch at first
    assert_candidates_are_compensated_as_copies("residual", seen=16)


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 63), (300, 65), (40, 257), (9, 300)])
def test_moments_are_those_of_all_pairs_of_columns(count: int, columns: int):
    x, y = torch.randn(2, 3 * count, columns, dtype=torch.float64) + 5
    moments = Moments.like(x[:count], y[:count])
    for some_x, some_y in zip(x.split(count), y.split(count), strict=True):
        moments.add(some_x, some_y)
    joint = np.cov(torch.cat([x, y], 1).numpy(), rowvar=False, bias=True)
    xx, yx, yy = moments.second(centred=True)
    np.testing.assert_allclose(xx, joint[:columns, :columns], atol=1e-12)
    np.testing.assert_allclose(yx, joint[columns:, :columns], atol=1e-12)
    np.testing.assert_allclose(yy, joint.diagonal()[columns:], atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (6, 3, 7), (5, 3, 4, 6), (2, 3, 2, 2, 3)])
def test_statistics_are_those_of_all_samples_and_positions(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(normalisation, "_BLOCK", 2 * torch.Size(shape[1:]).numel())  # two samples at a time
    batches = [torch.randn(shape, dtype=torch.float64) + 10 * number for number in range(2)]
    found = normalisation.Statistics()
    for batch in batches:
        found.add(batch)
    by_channel = torch.cat(batches).movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(found.mean, by_channel.mean(1))
    np.testing.assert_allclose(found.variance, by_channel.var(1))


def test_statistics_of_large_maps_look_at_the_same_positions_of_all_channels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(normalisation, "_ENOUGH", 60)
    x = torch.randn(5, 3, 8, 12)  # 480 numbers of each channel, 60 of them at every third position along both axes
    thinned = normalisation._thinned(x)
    assert thinned.equal(x[:, :, ::3, ::3])
    assert normalisation._thinned(x[:, :1]).equal(thinned[:, :1])
    assert normalisation._thinned(x[:1, :, :1]).shape == (1, 3, 1, 12)  # there is but one position along an axis
    assert normalisation._thinned(x[:, :, 0, 0]).equal(x[:, :, 0, 0])


@pytest.mark.parametrize("sample", [0, 3])
def test_what_has_changed_in_one_sample_alone_is_seen(sample: int):
    before = torch.randn(4, 3, 5)
    now = before.clone()
    work = SimpleNamespace(survey=SimpleNamespace(norms={}))
    meeting = SimpleNamespace(whole=SimpleNamespace(x=before), pruned=SimpleNamespace(x=now))
    assert not compensating._drifted(work, "layer", [meeting])
    now[sample, 1, 2] += 1e-3
    assert compensating._drifted(work, "layer", [meeting])


def test_outputs_whose_sum_is_not_finite_are_taken_if_they_are():
    huge = torch.full((8, 2), 3e38)
    compensating.check_finite("layer", huge)
    huge[3, 1] = torch.inf
    with pytest.raises(ValueError, match="'layer' returns numbers that are not finite"):
        compensating.check_finite("layer", huge)


@pytest.mark.parametrize(("method", "samples"), [("refit", 12), ("refit", 40), ("fold", 4)])
def test_what_is_fitted_to_few_samples_serves_others_too(method: str, samples: int, monkeypatch: pytest.MonkeyPatch):
    """Fewer than there are inputs of a layer, or not many more."""
    convs = [nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), *convs, nn.Flatten(), nn.Linear(24 * 9, 4))
    model = randomised(model.double()).eval()
    x, others = torch.randn(samples + 200, 3, 3, 3, dtype=torch.float64).split([samples, 200])
    plan = lp.plan(graph := lp.trace(model, x[:1]), lp.criteria.magnitude(graph), keep=0.5, round_to=1)
    plain, fitted = (error(pruned(model, plan, each, x), model, others) for each in ("none", method))
    assert fitted < plain
    monkeypatch.setattr(least_squares, "_RIDGES", ())  # nothing but what fits the samples best
    assert fitted < error(pruned(model, plan, method, x), model, others)


@pytest.mark.parametrize("intercept", [False, True])
def test_moments_tell_the_error_on_samples_that_are_set_aside(intercept: bool):
    x = torch.randn(50, 6, dtype=torch.float64) + 3
    y = torch.randn(50, 4, dtype=torch.float64) - 2
    moments = least_squares.Moments.like(x[:10], y[:10])
    aside = moments.empty()
    moments.add(x[:30], y[:30])
    aside.add(x[30:], y[30:])
    fitted = torch.randn(4, 6, dtype=torch.float64)
    constant = torch.randn(4, dtype=torch.float64) if intercept else torch.zeros(4, dtype=torch.float64)
    naive = (y[30:] - x[30:] @ fitted.T - constant).square().sum(1).mean()
    torch.testing.assert_close(aside.error(fitted, constant), float(naive))
    moments.join(aside)
    whole = least_squares.Moments.like(x[:10], y[:10])
    whole.add(x, y)
    for one, other in zip(moments.second(intercept), whole.second(intercept), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (90, 30)])
def test_samples_of_one_owner_are_set_aside_together(rows: int, columns: int):
    """What every other owner contradicts is not believed, however many samples there are of each."""
    owners = torch.arange(4).repeat_interleave(rows // 4)
    inputs = torch.randn(4, columns, dtype=torch.float64)[owners]  # all that a sample tells is whose it is
    outputs = torch.randn(4, 2, dtype=torch.float64)[owners]
    prior = torch.zeros(2, columns, dtype=torch.float64)
    told = least_squares.fit_samples(inputs, outputs, prior, False, owners)
    seen = owners != 3
    assert (outputs - inputs @ told.T)[~seen].square().sum() <= 1.2 * outputs[~seen].square().sum()


# -- memory ------------------------------------------------------------------------------------------------------------

PROGRAM = """
import torch
from torch import nn
import lightning_prune as lp

def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

torch.set_num_threads(1)
model = nn.Sequential(
    nn.Conv2d(3, 512, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(25088, 64)
).eval()
graph = lp.trace(model, torch.zeros(1, 3, 14, 14))
plan = graph.plan({"0": torch.arange(256)})
x = torch.randn(64, 3, 14, 14)
lp.prune(nn.Sequential(nn.Linear(8, 8)), graph.plan({}))  # code that is needed once
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = resident("VmRSS")
with torch.no_grad():
    wanted = model(x)
lp.prune(model, plan, compensate="METHOD", batches=x.split(16))
print(resident("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("method", METHODS)
def test_a_wide_classifier_makes_no_matrix_of_its_width(method: str):
    program = PROGRAM.replace("METHOD", method)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 600  # MiB, where 25,088 squared in double precision is 4,800


@pytest.mark.parametrize(("make", "momenta"), [
    (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), {"momentum_buffer"}),
    (lambda parameters: torch.optim.AdamW(parameters, 0.1), {"exp_avg"}),
    (
        lambda parameters: torch.optim.RMSprop(parameters, 0.1, momentum=0.9, centered=True),
        {"momentum_buffer", "grad_avg"},
    ),
    (lambda parameters: torch.optim.Adadelta(parameters, 0.1), set()),
    (lambda parameters: torch.optim.Rprop(parameters, 0.1), {"prev"}),
])  # fmt: skip
def test_momentum_of_changed_weights_is_zero(make: Any, momenta: set[str]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(64, 4)
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    lp.prune(model, halved(lp.trace(model, x)), [optimizer], compensate="refit", batches=[x])
    for parameter, is_changed in zip(model.parameters(), (False, False, True, True), strict=True):
        for key, value in optimizer.state[parameter].items():
            is_zero = isinstance(value, torch.Tensor) and not bool(value.any())
            assert is_zero == (is_changed and key in momenta), key
    optimizer.step()


def test_channels_of_groups_that_cross_are_taken_one_by_one() -> None:
    """Two heads of three channels: a channel of values lies in both heads, and a head has all of its channels."""
    model = nn.Linear(6, 2)
    values = PlannedGroup(3, (0, 2), (Slice("weight", 1, 0), Slice("weight", 1, 3)))
    heads = SimpleNamespace(size=2, channels=torch.tensor([1]), slices=(Slice("weight", 1, 0, step=3, width=3),))
    alone = PruningPlan({"values": values}, {"weight": (2, 6)})
    (block,) = wide_blocks(model, alone, "weight", 1)
    assert block.positions.tolist() == [[0, 3], [1, 4], [2, 5]]
    crossed: Any = SimpleNamespace(groups={"values": values, "heads": heads})
    assert wide_blocks(model, crossed, "weight", 1) == []
    assert wide_blocks(model, crossed, "weight", 0) == []
