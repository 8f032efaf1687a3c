"""Backward elimination with compensation, against one that solves each step anew."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine import randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.criteria import coherent_obs, score
from lightning_prune.criteria.channel_scores import flops_per_channel

X = torch.randn(24, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def network() -> nn.Sequential:
    layers = [nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 3)]
    return randomised(nn.Sequential(*layers).double()).eval()


def second_layer_by_hand(model: nn.Sequential) -> dict[str, np.ndarray]:
    """Return covariances and sensitivities at the second convolution, from explicit tensors."""
    inputs = model[:2](X).detach()
    outputs = model[2](inputs).detach().requires_grad_()
    logits = model[3:](outputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    [gradient] = torch.autograd.grad((logits * weights.double()).sum(), outputs)
    rows = inputs.movedim(1, -1).reshape(-1, 7).numpy()
    means = inputs.mean((2, 3)).numpy()
    apart = gradient - gradient.mean((2, 3), keepdim=True)
    return {
        "covariance": np.cov(rows.T, bias=True),
        "means": np.cov(means.T, bias=True),
        "varying": apart.square().sum((2, 3)).mean(0).numpy(),
        "uniform": gradient.sum((2, 3)).square().mean(0).numpy(),
        "weight": model[2].weight.detach().flatten(2).numpy(),
    }


def costs_by_hand(seen: dict[str, np.ndarray], kept: list[int]) -> np.ndarray:
    """Return what each kept channel costs next, with all others folded into the kept ones in one step."""
    covariance = seen["covariance"] + 1e-3 * np.diag(seen["covariance"]).mean() * np.eye(7)
    pruned = [channel for channel in range(7) if channel not in kept]
    inverse = np.linalg.inv(covariance[np.ix_(kept, kept)])
    shares = covariance[np.ix_(pruned, kept)] @ inverse
    # What is pruned counts in the means as well: that is what errors so far consist of.
    whole = np.zeros((7, len(kept)))
    whole[kept, range(len(kept))] = 1
    weight = seen["weight"][:, kept] + np.einsum("ort,rk->okt", seen["weight"][:, pruned], shares)
    costs = []
    for place in range(len(kept)):
        others = [each for each in range(len(kept)) if each != place]
        left = [kept[each] for each in others]
        regression = covariance[kept[place], left] @ np.linalg.inv(covariance[np.ix_(left, left)])
        error = np.zeros(7)
        error[kept[place]] = 1
        error[left] = -regression
        varying = (seen["varying"][:, None] * weight[:, place] ** 2).sum() * (error @ covariance @ error)
        uniform = (seen["uniform"] * weight[:, place].sum(1) ** 2).sum() * (error @ seen["means"] @ error)
        costs.append(varying + uniform)
    return np.array(costs)


def test_costs_are_those_of_solving_each_step_anew():
    model = network()
    graph = lp.trace(model, X[:1])
    scores = coherent_obs(graph, [X])["0"].numpy() * flops_per_channel(graph)["0"]
    seen = second_layer_by_hand(model)
    kept, greatest = list(range(7)), 0.0
    for _ in range(6):
        costs = costs_by_hand(seen, kept)
        greatest = max(greatest, costs.min())
        cheapest = kept.pop(int(costs.argmin()))
        assert scores[cheapest] == pytest.approx(greatest, rel=1e-9)
    assert scores[kept[0]] >= greatest


def test_channels_that_others_repeat_are_the_first_to_go():
    model = network()
    with torch.no_grad():
        for pruned, kept in ((1, 4), (6, 0)):
            model[0].weight[pruned] = 2 * model[0].weight[kept]
            model[0].bias[pruned] = 2 * model[0].bias[kept]
    scores = coherent_obs(lp.trace(model, X[:1]), X.split(8))["0"]
    first, second = scores.argsort()[:2].tolist()
    assert {first, second} in ({1, 6}, {1, 0}, {4, 6}, {4, 0})
    assert scores.sort().values[2] > 20 * scores[second]


def test_blocks_cost_little_more_than_single_channels(monkeypatch: pytest.MonkeyPatch):
    from lightning_prune.criteria import elimination

    model = randomised(nn.Sequential(nn.Linear(30, 160), nn.ReLU(), nn.Linear(160, 8)).double()).eval()
    x = torch.randn(600, 30, dtype=torch.float64)
    graph = lp.trace(model, x[:1])

    def error(scores: Tensor) -> float:
        pruned = copy.deepcopy(model)
        plan = graph.plan({"0": scores.argsort()[80:]})
        return lp.prune(pruned, plan, compensate="fold", batches=[x]).compensation.errors["2.weight"].after

    in_blocks = error(coherent_obs(graph, [x])["0"])
    monkeypatch.setattr(elimination, "_BLOCKS", 10**6)
    one_by_one = error(coherent_obs(graph, [x])["0"])
    assert in_blocks < 1.1 * one_by_one
    assert one_by_one < 0.8 * error(lp.criteria.magnitude(graph)["0"])


def test_flattened_maps_and_several_layers_behind_count():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)
            self.b = nn.Conv2d(6, 4, 1)
            self.f = nn.Linear(6 * 36, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x).relu()
            return self.b(x), self.f(x.flatten(1))

    model = randomised(Both().double()).eval()
    graph = lp.trace(model, X[:1])
    scores = coherent_obs(graph, [X])["a"]
    with torch.no_grad():
        model.b.weight[:, 2] = 0
        model.f.weight[:, 2 * 36 : 3 * 36] = 0
    unread = coherent_obs(graph, [X])["a"]
    assert scores.argmin() != 2 or scores[2] > 0
    assert unread.argmin() == 2
    assert unread[2] < 1e-9 * unread.max()


def test_nothing_changes_and_labels_are_not_needed():
    model = network().train()
    model[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    graph = lp.trace(model, X[:1])
    scores = score(graph, "coherent_obs", X.split(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] + [True] * 5
    assert all(module.training for module in model.modules())
    labelled = [(part, torch.zeros(8)) for part in X.split(8)]
    again = score(graph, "coherent_obs", labelled, lambda model, batch: model(batch[0]).sum())
    for name, values in scores.items():
        assert torch.equal(values, again[name])
    lp.prune(model, graph.plan({"0": torch.tensor([0, 2, 5])}))
    assert coherent_obs(graph, [X])["0"].isinf().tolist() == [False, True, False, True, True, False, True]


class Product(nn.Module):
    """Consumes one group by a product that no layer knows of, and another one by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.w = nn.Parameter(torch.zeros(6, 8))
        self.b = nn.Linear(8, 5)
        self.c = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() @ self.w
        return self.c(self.b(x).relu())


def test_what_no_layer_is_seen_to_consume_is_scored_by_its_weights_on_the_scale_of_the_others():
    model = randomised(Product().double()).eval()
    x = torch.randn(30, 4, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert set(graph.groups) == {"a", "w", "b"}
    flops = flops_per_channel(graph)
    costs = {name: scores * flops[name] for name, scores in coherent_obs(graph, [x]).items()}
    expected = {name: scores * flops[name] for name, scores in coherent_obs(graph).items()}
    quotients = costs["a"] / expected["a"]
    seen = costs["w"].mean() + costs["b"].mean()
    torch.testing.assert_close(quotients, (seen / (expected["w"].mean() + expected["b"].mean())).expand(6))
    assert float((costs["b"] / expected["b"]).std()) > 1e-3 * costs["b"].mean()


def test_layers_that_run_without_gradients_are_scored_by_their_weights():
    """As in front of a head that is trained alone."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.head = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    torch.manual_seed(1)
    model = randomised(Frozen()).eval()
    graph = lp.trace(model, X[:1])
    scores = coherent_obs(graph, [X])
    without = coherent_obs(graph)
    assert scores["body.0"].argsort().tolist() == without["body.0"].argsort().tolist()
    assert scores["head.0"].argsort().tolist() != without["head.0"].argsort().tolist()
    quotients = torch.cat([scores[name] / without[name] for name in ("body.0", "body.2")])
    torch.testing.assert_close(quotients, quotients[:1].expand_as(quotients))


@pytest.mark.parametrize("output", ["argmax", "none", "record"])
def test_whatever_a_model_returns_is_looked_into(output: str):
    @dataclass
    class Record:
        logits: Tensor

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = randomised(network())

        def forward(self, x: Tensor) -> Any:
            logits = self.layers(x)
            return {"argmax": logits.argmax(1), "none": None, "record": Record(logits)}[output]

    model = Returning().eval()
    graph = lp.trace(model.layers, X[:1])
    expected = coherent_obs(graph, [X]) if output == "record" else coherent_obs(graph)
    found = coherent_obs(lp.trace(model, X[:1]), [X])
    for name, values in expected.items():
        torch.testing.assert_close(found[f"layers.{name}"], values)


def test_tokens_are_positions():
    """A linear layer over the last axis is a convolution without a kernel."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = randomised(nn.Sequential(nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 2)).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Tokens().eval()
    convolutions = nn.Sequential(nn.Conv1d(3, 9, 1), nn.GELU(), nn.Conv1d(9, 2, 1)).double().eval()
    for layer, other in zip(model.layers, convolutions, strict=True):
        if isinstance(layer, nn.Linear):
            other.weight.data = layer.weight.data[:, :, None]
            other.bias.data = layer.bias.data

    class Projected(nn.Module):
        """Has its outputs in the order of the tokens, so that they are projected alike."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = convolutions

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.transpose(1, 2)).transpose(1, 2)

    x = torch.randn(12, 7, 3, dtype=torch.float64)
    [scores] = coherent_obs(lp.trace(model, x), [x]).values()
    [of_convolutions] = coherent_obs(lp.trace(Projected().eval(), x), [x]).values()
    torch.testing.assert_close(scores, of_convolutions, rtol=1e-9, atol=0)


def test_layers_in_convolution_groups_are_scored_too():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    model = randomised(nn.Sequential(*layers).double()).eval()
    scores = coherent_obs(lp.trace(model, X[:1]), [X])
    assert all(bool(values.isfinite().all()) for values in scores.values())
    assert len(scores) == len(lp.trace(model, X[:1]).groups)


def test_without_data_a_channel_costs_its_share_of_what_is_expected_behind_it():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 2, 1)
            self.norm = nn.BatchNorm2d(2)
            self.b = nn.Conv2d(1, 3, 1, bias=False)
            self.head = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.norm(self.a(x)), self.b(x)], 1))

    model = randomised(Joined().double()).eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, 2.0]))
        model.b.weight.copy_(torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1, 1))
    graph = lp.trace(model, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    flops = flops_per_channel(graph)
    scores = coherent_obs(graph)
    variances = torch.tensor([1.0, 4.0, 1.0, 9.0, 4.0], dtype=torch.float64)
    expected = model.head.weight.detach().flatten(1).square() * variances
    shares = (expected / expected.sum(1, keepdim=True)).mean(0)
    for name, values in (("a", shares[:2]), ("b", shares[2:])):
        torch.testing.assert_close(scores[name] * flops[name], values)
    model.norm.running_mean.fill_(7.0)  # tells nothing
    assert torch.equal(coherent_obs(graph)["a"], scores["a"])
    lp.prune(model, graph.plan({"a": torch.tensor([1])}))  # the other groups are as they were
    again = coherent_obs(graph)["a"]
    assert again.isinf().tolist() == [True, False]


def test_what_cannot_be_scored_is_refused():
    graph = lp.trace(randomised(Product()), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no batch"):
        coherent_obs(graph, [])
    with pytest.raises(ValueError, match="'taylor' needs a loss"):
        score(graph, "taylor", [torch.randn(3, 4)])


def test_large_maps_are_run_in_parts(monkeypatch: pytest.MonkeyPatch):
    """Which changes nothing but the order of sums."""
    from lightning_prune.criteria import layer_sensitivity

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()
            self.seen: list[int] = []

        def forward(self, images: Tensor, scale: Tensor) -> Tensor:
            seen.append(len(images))
            return self.layers(images * scale[:, None, None, None])

    seen: list[int] = []
    model = Scaled().eval()
    scale = torch.linspace(1, 2, 24, dtype=torch.float64)
    graph = lp.trace(model, (X, scale))
    seen.clear()
    whole = coherent_obs(graph, [{"images": X, "scale": scale}])
    monkeypatch.setattr(layer_sensitivity, "_AT_ONCE", 10 * X[0].numel())
    in_parts = coherent_obs(graph, [{"images": X, "scale": scale}])
    assert seen == [24, 10, 10, 4]
    for name, values in whole.items():
        torch.testing.assert_close(in_parts[name], values, rtol=1e-6, atol=0)
    [parts] = [list(layer_sensitivity._parts((X, torch.ones(3))))]
    assert len(parts) == 1  # which has no samples of the same number


def test_few_samples_do_not_make_channels_worthless():
    """On 20 samples any 20 channels fit all others, which independent ones do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 40)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(80))
        model[0].bias.zero_()
    x = torch.randn(4000, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = lp.trace(model, x[:1])

    def least(samples: int) -> float:
        scores = coherent_obs(graph, [x[:samples]])["0"]
        return float(scores.quantile(0.25) / scores.quantile(0.75))

    assert least(4000) > 0.7
    assert least(20) > 0.4
