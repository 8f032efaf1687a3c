"""Queries and keys whose channels are pruned: what is kept of them tells the products best."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation import attention
from lightning_prune.surgery.compensation.turning import mixes

HEADS, WIDTH, KEPT = 2, 6, 3  # heads, their width, and what is kept of that


class Attention(nn.Module):
    """Attention as it is written in many places: what differs is how heads are made and multiplied."""

    def __init__(self, split: str = "three", product: str = "function", bias: bool = True, shared: int = 1) -> None:
        super().__init__()
        width = HEADS * WIDTH
        self.split, self.product, self.shared = split, product, shared
        self.num_heads, self.head_dim, self.scale = HEADS, WIDTH, WIDTH**-0.5
        if split in ("three", "convolutions"):
            layer = nn.Linear if split == "three" else lambda *sizes, bias: nn.Conv1d(*sizes, 1, bias=bias)
            self.query = layer(12, width, bias=bias)
            self.key = layer(12, width // shared, bias=bias)
            self.value = layer(12, width // shared, bias=bias)
        else:
            self.qkv = nn.Linear(12, 3 * width, bias=bias)
        self.out = nn.Linear(width, 12)

    def heads(self, x: Tensor, y: Tensor) -> Any:
        n = x.shape[0]
        if self.split == "convolutions":
            layers = zip((self.query, self.key, self.value), (x, y, y), strict=True)
            return [layer(z.mT).view(n, self.num_heads, -1, z.shape[1]).mT for layer, z in layers]
        if self.split == "chunks":
            return [z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1)]
        if self.split == "five axes":
            return self.qkv(x).reshape(n, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        queries = self.query(x).view(n, -1, self.num_heads, self.head_dim)
        keys = self.key(y).view(n, -1, self.num_heads // self.shared, self.head_dim)
        values = self.value(y).unflatten(-1, (self.num_heads // self.shared, -1))
        return [z.transpose(1, 2) for z in (queries, keys, values)]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x, x if y is None else y)
        if self.product == "function":
            attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=self.shared > 1)
        elif self.product == "matrices":
            if self.shared > 1:
                k, v = (z.repeat_interleave(self.shared, 1) for z in (k, v))
            scores = (q * self.scale) @ k.transpose(-2, -1)
            attended = F.dropout((scores + torch.zeros(())).softmax(-1), 0.1, self.training) @ v
        elif self.product == "batches":
            flat = [z.reshape(-1, *z.shape[2:]) for z in (q / 2, k, v)]
            weights = F.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)), dim=-1)
            attended = torch.bmm(weights, flat[2]).view(q.shape[0], -1, *v.shape[2:])
        else:
            scores = torch.einsum("bhid, bhjd -> bhij", q, k) * self.scale
            attended = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)
        return self.out(attended.transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """PyTorch's own, of a stream or between two, with one weight or three."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True, **settings)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.attention(x, y, y, need_weights=False)[0]


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "three layers": (Attention, (12,)),
    "without bias": (lambda: Attention(bias=False), (12,)),
    "matrices": (lambda: Attention(product="matrices"), (12,)),
    "batches of matrices": (lambda: Attention("chunks", product="batches"), (12,)),
    "sums": (lambda: Attention("chunks", product="sums"), (12,)),
    "five axes": (lambda: Attention("five axes"), (12,)),
    "convolutions": (lambda: Attention("convolutions"), (12,)),
    "two streams": (Attention, (12, 12)),
    "shared keys": (lambda: Attention(shared=2), (12,)),
    "repeated keys": (lambda: Attention(product="matrices", shared=2), (12,)),
    "of torch": (Torch, (12,)),
    "of torch, two streams": (Torch, (12, 12)),
    "of torch, other widths": (lambda: Torch(kdim=5, vdim=5), (12, 5)),
}


def network(form: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, widths = FORMS[form]
    inputs = tuple(torch.randn(40, 7 + number, width).double() for number, width in enumerate(widths))
    return randomised(build().double()).eval(), inputs


def narrowed(graph: ChannelGraph) -> PruningPlan:
    """Return the plan that keeps half the width of queries and keys."""
    groups = [name for name, group in graph.groups.items() if group.kind == "query-key" or name.endswith("query")]
    assert groups
    return graph.plan({name: torch.randperm(WIDTH)[:KEPT] for name in groups})


def in_batches(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(16) for x in inputs), strict=True))


@torch.no_grad()
def make_mixtures(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Let the pruned channels of queries and keys be mixtures of kept ones, others in each head.

    Where the values are pruned with them, all heads have the same mixtures, as a fold takes for granted of values.
    """
    tensors = graph.model.state_dict()
    is_one = "qkv.weight" in tensors
    for name, planned in plan.groups.items():
        group = graph.groups[name]
        slices = dict.fromkeys(group.out_slices + group.other_slices)
        mixture = {}
        for one in slices:
            if one.tensor.rpartition(".")[2] == "out":
                continue
            key = is_one or (one.tensor.replace("bias", "weight"), one.start)
            mix = mixture.setdefault(key, torch.randn(WIDTH - KEPT, KEPT).double())
            tensor = tensors[one.tensor]
            kept = tensor.index_select(one.axis, one.positions(planned.channels))
            mixed = torch.einsum("rk,k...->r...", mix, kept)
            tensor.index_copy_(one.axis, one.positions(planned.pruned), mixed)


@torch.no_grad()
def apart(model: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    wanted = other(*inputs)
    return float((model(*inputs) - wanted).norm() / wanted.norm())


def pruned(model: nn.Module, plan: PruningPlan, method: str, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Any]:
    smaller = copy.deepcopy(model)
    report = lp.prune(smaller, plan, compensate=method, batches=in_batches(inputs))
    return smaller, report.compensation


@pytest.mark.parametrize(
    ("form", "method"),
    [(form, "fold") for form in FORMS] + [(form, "refit") for form in ("three layers", "of torch", "two streams")],
)
def test_queries_and_keys_that_are_mixtures_of_others_are_pruned_without_a_trace(form: str, method: str):
    model, inputs = network(form)
    graph = lp.trace(model, inputs)
    plan = narrowed(graph)
    make_mixtures(graph, plan)
    plain, _ = pruned(model, plan, "none", inputs)
    assert apart(plain, model, inputs) > 1e-2
    smaller, report = pruned(model, plan, method, inputs)
    assert report.not_compensated == {}
    assert apart(smaller, model, inputs) < 1e-9
    others = tuple(torch.randn_like(x) for x in inputs)
    assert apart(smaller, model, others) < 1e-9


@torch.no_grad()
def explicit_scores(queries: nn.Linear, keys: nn.Linear, x: Tensor, width: int) -> np.ndarray:
    """Return the scores of all queries by all keys, less what all scores of a query have in common: (heads, ...)."""
    q = queries(x).unflatten(-1, (HEADS, width)).movedim(2, 0).flatten(1, 2)
    k = keys(x).unflatten(-1, (HEADS, width)).movedim(2, 0)
    k = (k - k.mean(2, keepdim=True)).flatten(1, 2)
    return (q @ k.mT).numpy()


def test_scores_are_the_nearest_of_their_rank_to_those_before():
    model, inputs = network("three layers")
    smaller, report = pruned(model, narrowed(lp.trace(model, inputs)), "fold", inputs)
    [x] = inputs
    before = explicit_scores(model.query, model.key, x, WIDTH)
    after = explicit_scores(smaller.query, smaller.key, x, KEPT)
    shares = np.linalg.svd(before, compute_uv=False)  # Eckart and Young: what is beyond the rank is what is missed
    missed = np.square(shares[:, KEPT:]).sum(1)
    np.testing.assert_allclose(np.square(after - before).sum((1, 2)), missed, rtol=1e-6)
    assert report.scores["query.weight"].after == pytest.approx(missed.sum() / np.square(before).sum(), rel=1e-6)
    assert report.scores["query.weight"].before > 2 * report.scores["query.weight"].after


def test_either_side_is_least_squares_on_explicit_products():
    """Given the keys that are kept, no queries mixed of those before tell all products better."""
    queries = torch.randn(20, 5).double() @ torch.randn(5, 5).double() + 1
    keys = torch.randn(18, 5).double() @ torch.randn(5, 5).double()
    kept = torch.tensor([True, False, True, False, False])
    query_mix, key_mix = mixes(queries.T @ queries, keys.T @ keys, kept)
    for left, right, mix, other in ((queries, keys, query_mix, key_mix), (keys, queries, key_mix, query_mix)):
        narrow = (right @ other).numpy()
        rows = [np.outer(one, two).reshape(-1) for one in left.numpy() for two in narrow]
        wanted = (left @ right.T).reshape(-1).numpy()
        solution, *_ = np.linalg.lstsq(np.stack(rows), wanted, rcond=None)
        np.testing.assert_allclose(mix.reshape(-1), solution, atol=1e-8)


@pytest.mark.parametrize(
    "equation", ["bhid,bhjd->bhij", "bihd, bjhd -> bhij", "id,jd->ij", "bhid,bjd->bhij", "dbi,hdj->bhij"]
)
def test_sums_are_products_of_queries_and_keys(equation: str):
    axes = equation.replace(" ", "").partition("->")[0].split(",")
    sizes = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6}
    factors = [torch.randn([sizes[axis] for axis in one]).double() for one in axes]
    orders = attention._orders(equation)
    query, key = (attention._ordered(*each) for each in zip(factors, axes, orders, strict=True))
    torch.testing.assert_close(query @ key.mT, torch.einsum(equation, *factors))


@pytest.mark.parametrize("equation", ["bid,bje->bij", "...id,...jd->...ij", "bid->bi", "bid,bid->bi"])
def test_other_sums_are_none(equation: str):
    assert attention._orders(equation) == []


# -- what does not change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrices", "of torch"])
def test_queries_and_keys_that_are_kept_are_as_they_were(form: str):
    model, inputs = network(form)
    graph = lp.trace(model, inputs)
    others = {name: torch.arange(group.size // 2) for name, group in graph.groups.items() if group.kind != "query-key"}
    smaller, report = pruned(model, graph.plan(others), "fold", inputs)
    plain, _ = pruned(model, graph.plan(others), "none", inputs)
    assert report.scores == {}
    for name, values in plain.state_dict().items():
        if not name.startswith(("out", "attention.out_proj")):
            assert torch.equal(smaller.state_dict()[name], values), name


def test_the_same_bits_come_out_each_time_and_averages_stay_near():
    model, inputs = network("five axes")
    plan = narrowed(lp.trace(model, inputs))
    first, second = (pruned(model, plan, "refit", inputs)[0].state_dict() for _ in range(2))
    for name, values in first.items():
        assert torch.equal(second[name], values)
    average = copy.deepcopy(model)
    for parameter in average.parameters():
        parameter.data += 1e-6 * torch.randn_like(parameter)
    near, _ = pruned(average, plan, "refit", inputs)
    for name, values in near.state_dict().items():
        assert (first[name] - values).abs().max() < 1e-3, name


def rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Peculiar(Attention):
    """Attention with something that queries and keys are computed with before they are multiplied."""

    def __init__(self, what: str) -> None:
        super().__init__(product="matrices")
        self.what = what
        self.norm = nn.LayerNorm(WIDTH) if what == "norm" else nn.Identity()

    def heads(self, x: Tensor, y: Tensor) -> Any:
        q, k, v = super().heads(x, y)
        if self.what == "rotated":
            angles = torch.arange(q.shape[2]).double()[:, None]
            q, k = (z * angles.cos() + rotated(z) * angles.sin() for z in (q, k))
        elif self.what == "by place":
            q = q * torch.arange(1, 1 + q.shape[2]).double()[:, None]
        elif self.what == "written to":
            q[:, :, :2] *= 3
        elif self.what == "keys are values":
            v = k
        return self.norm(q), k, v


@pytest.mark.parametrize("what", ["rotated", "norm", "by place", "written to", "keys are values"])
def test_what_else_is_computed_with_queries_and_keys_is_told_and_left_alone(what: str):
    model = randomised(Peculiar(what).double()).eval()
    inputs = (torch.randn(32, 7, 12).double(),)
    graph = lp.trace(model, inputs)
    name = next(name for name, group in graph.groups.items() if "query.weight" in {one.tensor for one in group.slices})
    plan = graph.plan({name: torch.arange(graph.groups[name].size // 2)})
    smaller, report = pruned(model, plan, "fold", inputs)
    plain, _ = pruned(model, plan, "none", inputs)
    for weight in ("query.weight", "key.weight"):
        assert torch.equal(smaller.state_dict()[weight], plain.state_dict()[weight])
        assert "queries" in report.not_compensated[weight]
    assert report.scores == {}
    if what not in ("norm", "keys are values"):
        assert apart(smaller, plain, inputs) < 1e-9


def test_products_that_no_softmax_is_taken_of_are_left_alone():
    class Linear(Attention):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x, x)
            return self.out(((q @ k.mT) @ v).transpose(1, 2).flatten(2))

    model = randomised(Linear().double()).eval()
    inputs = (torch.randn(32, 7, 12).double(),)
    plan = narrowed(lp.trace(model, inputs))
    smaller, report = pruned(model, plan, "fold", inputs)
    assert report.scores == {}
    assert {"query.weight", "key.weight"} <= report.not_compensated.keys()
    assert apart(smaller, pruned(model, plan, "none", inputs)[0], inputs) < 1e-9


@pytest.mark.parametrize("rotates", [True, False])
def test_heads_that_are_pruned_whole_are_not_told_of(rotates: bool):
    class Whole(Attention):
        def heads(self, x: Tensor, y: Tensor) -> Any:
            q, k, v = super().heads(x, y)
            return (rotated(q), rotated(k), v) if rotates else (q, k, v)

    model = randomised(Whole("chunks").double()).eval()
    inputs = (torch.randn(32, 7, 12).double(),)
    graph = lp.trace(model, inputs)
    [name] = [name for name, group in graph.groups.items() if group.kind == "heads"]
    _, report = pruned(model, graph.plan({name: torch.tensor([1])}), "refit", inputs)
    assert report.scores == report.not_compensated == {}
    assert report.errors


def test_heads_that_talk_to_each_other_are_turned():
    class Talking(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.talk = nn.Linear(HEADS, HEADS)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x, x)
            scores = self.talk((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = randomised(Talking().double()).eval()
    inputs = (torch.randn(32, 7, 12).double(),)
    graph = lp.trace(model, inputs)
    plan = narrowed(graph)
    make_mixtures(graph, plan)
    assert apart(pruned(model, plan, "fold", inputs)[0], model, inputs) < 1e-9


# -- with everything else ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["five axes", "of torch", "convolutions"])
def test_heads_and_their_widths_are_pruned_one_after_the_other_and_at_once(form: str):
    model, inputs = network(form)
    graph = lp.trace(model, inputs)
    width = {name: torch.arange(4) for name, group in graph.groups.items() if group.kind == "query-key"}
    heads = {name: torch.tensor([1]) for name, group in graph.groups.items() if group.kind == "heads"}
    first, _ = pruned(model, graph.plan(width), "refit", inputs)
    for start in (model, first):
        plain, _ = pruned(start, graph.plan({**width, **heads}), "none", inputs)
        smaller, report = pruned(start, graph.plan({**width, **heads}), "refit", inputs)
        assert report.not_compensated == {}
        assert apart(smaller, model, inputs) < apart(plain, model, inputs)
    again, report = pruned(first, graph.plan({name: torch.arange(2) for name in width}), "fold", inputs)
    assert report.scores
    assert apart(again, model, inputs) < 1


def test_candidates_are_turned_as_copies_are():
    model, inputs = network("five axes")
    graph = lp.trace(model, inputs)
    plans = [
        narrowed(graph),
        graph.plan({name: torch.tensor([0]) for name in graph.groups if "heads" in name}),
        narrowed(graph),
    ]

    def squared(network: nn.Module, batch: Any) -> tuple[Tensor, float]:
        return network(*batch).square().mean(), 0.0

    measured = evaluate_candidates(
        graph, plans, [inputs], evaluate=squared, compensate="fold", compensate_batches=in_batches(inputs)
    )
    for plan, loss in zip(plans, measured.loss, strict=True):
        copied, _ = pruned(model, plan, "fold", inputs)
        torch.testing.assert_close(loss, copied(*inputs).square().mean(), rtol=1e-9, atol=1e-12)


def test_few_samples_do_not_tell_too_much():
    model, _ = network("three layers")
    seen, others = (torch.randn(1, 3, 12).double(),), (torch.randn(60, 9, 12).double(),)
    plan = narrowed(lp.trace(model, seen))
    smaller, _ = pruned(model, plan, "fold", seen)
    assert apart(smaller, model, others) < 1.2 * apart(pruned(model, plan, "none", seen)[0], model, others)


def test_momentum_of_turned_weights_is_zero():
    model, inputs = network("of torch")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(*inputs).square().mean().backward()
    optimizer.step()
    plan = narrowed(lp.trace(model, inputs))
    lp.prune(model, plan, optimizer, compensate="refit", batches=in_batches(inputs))
    assert not optimizer.state[model.attention.in_proj_weight]["momentum_buffer"].any()
