"""The Taylor criterion as a function: worked out by hand, by definition, and what it must not change."""

import math
from typing import Any

import pytest
import torch
from engine import randomised
from taylor_reference import reference
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria.first_order_sums import Totals
from lightning_prune.planning.cost import CostModel


def two_maps() -> tuple[nn.Module, Tensor]:
    """Two feature maps of two positions: the input itself, and twice the input; their sum is the loss of a sample."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, (1, 2), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        nn.init.ones_(model[1].weight)
    # activation times gradient: (1, -3) and (2, 1) of the first map, twice as much of the second
    return model, torch.tensor([[1.0, -3.0], [2.0, 1.0]]).view(2, 1, 1, 2)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("a", [2.5, 5.0]),  # (|1 - 3| + |2 + 1|) / 2
        ("b", [3.5, 7.0]),  # (1 + 3 + 2 + 1) / 2
        ("c", [0.5, 1.0]),  # |1 - 3 + 2 + 1| / 2
        ("gate", [0.25, 1.0]),  # 0.5 squared
    ],
)
def test_variants_by_hand(variant: str, expected: list[float]) -> None:
    model, x = two_maps()
    graph = lp.trace(model, x)
    scores = lp.criteria.taylor(graph, [x], lambda model, x: model(x).mean(), variant, normalize=False)["0"]
    assert scores.tolist() == expected
    normal = torch.tensor(expected, dtype=torch.float64) / math.hypot(*expected)
    scores = lp.criteria.taylor(graph, [x], lambda model, x: model(x).mean(), variant, normalize=True)["0"]
    torch.testing.assert_close(scores, normal)


class Picture(Tensor):
    """Knows of its samples one by one, and does not let them be taken apart or summed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.sum, Tensor.movedim):
            raise ValueError("Inconsistent samples.")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_that_know_more_are_summed_as_plain_ones() -> None:
    model, x = two_maps()
    graph = lp.trace(model, x)
    scores = lp.criteria.taylor(
        graph, [x], lambda model, x: model(x.as_subclass(Picture)).mean(), "a", normalize=False
    )["0"]
    assert scores.tolist() == [2.5, 5.0]
    totals = Totals()
    totals.begin_step(torch.ones(()).as_subclass(Picture))
    assert {name: type(count) for name, count in totals.steps.items()} == {"steps": Tensor, "loss": Tensor}


def test_half_precision_has_room_for_products() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0], [10.0]]))
        model[1].weight.fill_(2e4)
    x = torch.ones(1, 1).half()
    scores = lp.criteria.taylor(lp.trace(model, x), [x], lambda model, x: model(x).mean(), "a", normalize=False)["0"]
    assert scores.tolist() == [1e5, 2e5]  # above the greatest number of half precision


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("gate", [4.0, 30.25]),  # activations 2 and 5.5, each times a weight of 1
        ("sum_then_square", [4.0, 30.25]),  # (3 - 2 + 1) and (6 - 1 + 0.5), weights and bias
        ("square_then_sum", [14.0, 37.25]),  # 9 + 4 + 1 and 36 + 1 + 0.25
    ],
)
def test_weight_forms_by_hand(variant: str, expected: list[float]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    x = torch.tensor([[3.0, -1.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.5]))
        nn.init.ones_(model[2].weight)
    graph = lp.trace(model, x)
    scores = lp.criteria.taylor(graph, [x], lambda model, x: model(x).mean(), variant)["0"]
    assert scores.tolist() == expected


class Network(nn.Module):
    """A shortcut, normalisation, a grouped convolution and a flattened map, so that channels have several places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 8, 3, padding=1)
        self.back = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.block(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


CONSUMERS = {"stem": ("block", "head"), "block": ("back",)}


def loss(model: nn.Module, batch: Any, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def some_batches(sizes: tuple[int, ...] = (5, 5, 3)) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (size,))) for size in sizes]


@pytest.fixture
def graph() -> lp.graph.ChannelGraph:
    return lp.trace(randomised(Network()).double(), torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("variant", ["a", "b", "c", "gate"])
def test_variants_by_definition(variant: str, graph: lp.graph.ChannelGraph) -> None:
    """Batches of different sizes: every sample counts alike; a gate is of the mean over its batch."""
    graph.model.train()
    batches = some_batches()
    scores = lp.criteria.taylor(graph, batches, loss, variant, normalize=False)
    assert graph.model.training
    graph.model.eval()
    expected = reference(graph.model, batches, lambda m, batch: loss(m, batch, "sum"), CONSUMERS, variant)
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name])


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("variant", ["a", "c", "gate"])
def test_a_loss_that_differentiates_itself(variant: str, weight: float, graph: lp.graph.ChannelGraph) -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        images = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images, create_graph=True)
        return loss(model, batch) + weight * gradient.square().sum() / len(images)

    batches = some_batches()
    scores = lp.criteria.taylor(graph, batches, penalised, variant, normalize=False)
    graph.model.eval()
    expected = reference(graph.model, batches, lambda m, batch: penalised(m, batch) * len(batch[0]), CONSUMERS, variant)
    plain = lp.criteria.taylor(graph, batches, loss, variant, normalize=False)
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name])
        assert torch.equal(values, plain[name]) == (weight == 0)


def test_a_derivative_that_does_not_need_every_gradient(graph: lp.graph.ChannelGraph) -> None:
    def curved(model: nn.Module, batch: Any) -> Tensor:
        ones = torch.ones_like(batch[0])
        _, product = torch.autograd.functional.hvp(lambda x: model(x).sum(), batch[0], ones, create_graph=True)
        return loss(model, batch) + 0.0 * product.sum()

    batches = some_batches()
    plain = lp.criteria.taylor(graph, batches, loss)
    for name, values in lp.criteria.taylor(graph, batches, curved).items():
        assert torch.equal(values, plain[name])


@pytest.mark.parametrize("variant", ["a", "b", "c"])
def test_how_samples_are_batched_makes_no_difference(variant: str, graph: lp.graph.ChannelGraph) -> None:
    images, labels = (torch.cat(tensors) for tensors in zip(*some_batches(), strict=True))
    one = lp.criteria.taylor(graph, [(images, labels)], loss, variant)
    single = lp.criteria.taylor(graph, [(images[i : i + 1], labels[i : i + 1]) for i in range(13)], loss, variant)
    for name, values in one.items():
        torch.testing.assert_close(values, single[name])


def test_the_gate_is_the_change_of_the_loss_to_first_order(graph: lp.graph.ChannelGraph) -> None:
    """Scale what is consumed of a channel a little, by a central difference."""
    (batch,) = some_batches((4,))
    graph.model.eval()
    scores = lp.criteria.taylor(graph, [batch], loss, "gate")["block"]
    weight = graph.model.back.weight
    with torch.no_grad():
        for channel in range(8):
            losses = []
            for step in (1e-5, -1e-5):
                kept = weight[:, channel].clone()
                weight[:, channel] *= 1 + step
                losses.append(float(loss(graph.model, batch)))
                weight[:, channel] = kept
            assert float(scores[channel]) == pytest.approx(((losses[0] - losses[1]) / 2e-5) ** 2, rel=1e-5, abs=1e-12)


def test_does_not_change_the_model(graph: lp.graph.ChannelGraph) -> None:
    model = graph.model.train()
    model.norm.eval()
    model.block.weight.requires_grad_(False)
    loss(model, some_batches((2,))[0]).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, settings in (("taylor", {"variant": "gate"}), ("taylor", {}), ("apoz", {}), ("mean_activation", {})):
            lp.criteria.score(graph, {"name": name, **settings}, some_batches(), loss)
    assert model.training
    assert not model.norm.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["block.weight"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    assert all(torch.equal(model.get_parameter(name).grad, value) for name, value in gradients.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_layers_are_scored_like_others(graph: lp.graph.ChannelGraph) -> None:
    batches = some_batches()
    expected = [lp.criteria.taylor(graph, batches, loss, variant) for variant in ("a", "gate")]
    graph.model.requires_grad_(False)
    for variant, scores in zip(("a", "gate"), expected, strict=True):
        for name, values in lp.criteria.taylor(graph, batches, loss, variant).items():
            torch.testing.assert_close(values, scores[name])


@pytest.mark.parametrize("variant", ["a", "b", "c", "gate", "sum_then_square", "square_then_sum"])
def test_after_a_prune_channels_keep_their_numbers(variant: str, graph: lp.graph.ChannelGraph) -> None:
    """Zeroing what is consumed of a channel first, so that pruning it changes nothing."""
    from lightning_prune.surgery.masks import mask

    plan, batches = graph.plan({"stem": torch.tensor([0, 3, 4]), "block": torch.tensor([1, 2, 6, 7])}), some_batches()
    mask(graph, plan)
    before = lp.criteria.taylor(graph, batches, loss, variant, normalize=False)
    lp.prune(graph.model, plan)
    after = lp.criteria.taylor(graph, batches, loss, variant, normalize=False)
    for name, group in plan.groups.items():
        assert after[name][group.pruned].tolist() == [-math.inf] * len(group.pruned)
        if variant != "square_then_sum":  # which also counts the weights that consume pruned channels: zeros
            torch.testing.assert_close(after[name][list(group.kept)], before[name][list(group.kept)])


@pytest.mark.parametrize("normalize", [True, False])
def test_the_cost_of_a_channel_is_subtracted_last(normalize: bool, graph: lp.graph.ChannelGraph) -> None:
    batches, cost = some_batches(), CostModel(graph, "flops")
    free = lp.criteria.taylor(graph, batches, loss, normalize=normalize)
    charged = lp.criteria.taylor(graph, batches, loss, normalize=normalize, flops_penalty=0.5)
    saved = {name: cost({}) - cost({name: group.size - 1}) for name, group in graph.groups.items()}
    for name, flops in saved.items():
        torch.testing.assert_close(charged[name], free[name] - 0.5 * flops / sum(saved.values()))


def test_settings_and_data_that_do_not_fit(graph: lp.graph.ChannelGraph) -> None:
    with pytest.raises(ValueError, match=r"variant must be one of a, b, c, gate, .* got 'z'"):
        lp.criteria.taylor(graph, some_batches(), loss, "z")
    with pytest.raises(ValueError, match="flops_penalty must be a number of at least 0; got nan"):
        lp.criteria.taylor(graph, some_batches(), loss, flops_penalty=math.nan)
    with pytest.raises(ValueError, match="No finite gradient was seen of stem, block: no batch, or the loss does not"):
        lp.criteria.taylor(graph, [], loss)
    with pytest.raises(ValueError, match="No finite gradient was seen of stem, block"):
        lp.criteria.taylor(graph, some_batches(), lambda model, batch: loss(model, batch) * math.nan)


class OntoBuffer(nn.Module):
    """Channels that no layer consumes, as N-BEATS has: they are multiplied by a buffer; a gate tells what they do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.theta = nn.Linear(5, 6), nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7) if kind == "norm" else nn.Identity()
        self.act = nn.LeakyReLU(0.2, inplace=True) if kind == "in_place" else nn.Identity()
        self.register_buffer("basis", torch.randn(7, 4))
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        values = self.norm(self.theta(self.first(x).relu()))
        return self.act(values if self.gate is None else values * self.gate) @ self.basis


@pytest.mark.parametrize("kind", ["plain", "norm", "in_place"])
@pytest.mark.parametrize("variant", ["a", "b", "c", "gate"])
def test_channels_that_no_layer_consumes_are_scored_where_they_are_made(kind: str, variant: str) -> None:
    torch.manual_seed(0)
    model = OntoBuffer(kind).double().eval()
    if kind == "norm":
        for affine in model.norm.parameters():
            nn.init.normal_(affine)
    x, y = torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1).mean()

    found = lp.criteria.taylor(lp.trace(model, x[:1]), [(x, y)], loss, variant, normalize=False)
    model.gate = torch.ones(9, 7).double().requires_grad_()
    (by_sample,) = torch.autograd.grad((model(x) - y).square().sum(), model.gate)
    expected = {"a": by_sample.abs().mean(0), "c": by_sample.mean(0).abs(), "gate": by_sample.mean(0).square()}
    torch.testing.assert_close(found["theta"], expected["a" if variant == "b" else variant])


class Normalised(nn.Module):
    """Channels that a layer consumes whose weight is computed of others; a gate tells what they do."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), norm(nn.Linear(7, 4))
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        values = self.first(x).relu()
        return self.last(values if self.gate is None else values * self.gate)


NORMALISING = {
    "weight_norm": nn.utils.parametrizations.weight_norm, "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm, "old spectral_norm": nn.utils.spectral_norm,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", NORMALISING)
def test_layers_with_normalised_weights_are_watched(norm: str) -> None:
    torch.manual_seed(0)
    model = Normalised(NORMALISING[norm]).double().eval()
    x, y = torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1).mean()

    found = lp.criteria.taylor(lp.trace(model, x[:1]), [(x, y)], loss, "a", normalize=False)
    model.gate = torch.ones(9, 7).double().requires_grad_()
    (by_sample,) = torch.autograd.grad((model(x) - y).square().sum(), model.gate)
    torch.testing.assert_close(found["first"], by_sample.abs().mean(0))
