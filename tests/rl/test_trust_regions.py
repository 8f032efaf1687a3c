"""Trust regions: truths of the metrics, and expansions against the full form."""

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.rl.distributions import Categorical, Distribution, Gaussian
from lightning_prune.rl.trust_regions import (
    Clip,
    Correntropy,
    CorrentropyFirstOrder,
    CorrentropySecondOrder,
    KullbackLeibler,
    Penalty,
)

METRICS = [Correntropy, CorrentropyFirstOrder, CorrentropySecondOrder]


def normal(mean: Tensor, std: Tensor) -> Gaussian:
    return Gaussian(mean, std, torch.full_like(mean, -1e3), torch.full_like(mean, 1e3))


def classes(logits: Tensor) -> Categorical:
    return Categorical(logits, torch.zeros(len(logits), 1), torch.full((len(logits), 1), logits.shape[1] - 1.0))


@pytest.mark.parametrize("make", [*METRICS, KullbackLeibler])
def test_distance_is_zero_at_the_old_policy_and_positive_elsewhere(make: type[Penalty]) -> None:
    mean, std, logits = torch.randn(6, 2), torch.rand(6, 2) + 0.5, torch.randn(6, 3)
    for old, new in (
        (normal(mean, std), normal(mean + 0.3, std * 1.2)),
        (classes(logits), classes(logits + torch.randn(6, 3))),
    ):
        torch.testing.assert_close(make().distance(old, old), torch.zeros(6), atol=1e-6, rtol=0)
        assert (make().distance(old, new) > 0).all()


@pytest.mark.parametrize("make", [*METRICS, KullbackLeibler])
def test_descending_the_distance_leads_a_gaussian_back_to_the_old_policy(make: type[Penalty]) -> None:
    old = normal(torch.zeros(1, 2), torch.ones(1, 2))
    mean = torch.tensor([[0.4, -0.4]], requires_grad=True)
    std = torch.tensor([[1.3, 0.7]], requires_grad=True)
    gradients = torch.autograd.grad(make().distance(old, normal(mean, std)).sum(), (mean, std))
    for parameter, gradient, goal in zip((mean, std), gradients, (0.0, 1.0), strict=True):
        assert torch.equal((parameter - goal).sign(), gradient.sign())  # so that a step along -gradient comes nearer


@pytest.mark.parametrize("make", [*METRICS, KullbackLeibler])
def test_descending_the_distance_leads_classes_back_to_the_old_policy(make: type[Penalty]) -> None:
    old = classes(torch.tensor([[0.5, 0.0, -0.5]]))
    logits = torch.tensor([[-0.5, 0.2, 1.0]], requires_grad=True)
    distance = make().distance(old, classes(logits)).sum()
    (gradient,) = torch.autograd.grad(distance, logits)
    gaps = [(classes(point).parameters() - old.parameters()).norm() for point in (logits, logits - 0.5 * gradient)]
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_metric_is_that_of_a_naive_loop(sigma: float) -> None:
    old, new = (normal(torch.randn(4, 3), torch.rand(4, 3) + 0.5) for _ in range(2))

    def kernel(difference: float) -> float:
        return math.exp(-(difference**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)

    expected = []
    for row in range(4):
        differences = [*(old.mean - new.mean)[row].tolist(), *(old.std - new.std)[row].tolist()]
        expected.append(sum(kernel(0.0) - kernel(difference) for difference in differences) / 6)
    torch.testing.assert_close(Correntropy(sigma=sigma).distance(old, new), torch.tensor(expected))


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_expansions_miss_the_metric_by_the_next_term(sigma: float) -> None:
    shift, one = torch.full((1, 1), 0.2 * sigma, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    old, new = normal(0 * shift, one), normal(shift, one)
    metric, first, second = (make(sigma=sigma).distance(old, new).item() for make in METRICS)
    exponent, scale = 0.2**2 / 2, 1 / (2 * math.sqrt(2 * math.pi) * sigma)  # half: the std does not differ
    assert first - metric == pytest.approx(scale * exponent**2 / 2, rel=0.01)
    assert metric - second == pytest.approx(scale * exponent**3 / 6, rel=0.01)


def test_second_order_never_pushes_far_policies_apart() -> None:
    exponent = torch.linspace(0, 10, 101, requires_grad=True)
    (slope,) = torch.autograd.grad(CorrentropySecondOrder().rise(exponent).sum(), exponent)
    assert (slope >= 0).all()


@pytest.mark.parametrize(("variance", "forward", "backward"), [(0.25, 2.807, 0.818), (4.0, 0.443, 1.307)])
def test_divergence_is_not_symmetric_and_the_metric_is(variance: float, forward: float, backward: float) -> None:
    one = torch.ones(1, 1)
    p, q = normal(0 * one, one), normal(one, one * variance**0.5)
    assert KullbackLeibler().distance(p, q).item() == pytest.approx(forward, abs=5e-4)
    assert KullbackLeibler().distance(q, p).item() == pytest.approx(backward, abs=5e-4)
    assert Correntropy().distance(p, q).item() == Correntropy().distance(q, p).item()


@pytest.mark.parametrize("make", [KullbackLeibler, *METRICS])
@pytest.mark.parametrize(("factor", "expected"), [(0.6, 0.5), (0.7, 1.0), (1.4, 1.0), (1.6, 2.0)])
def test_coefficient_follows_the_distance_beyond_a_margin(make: type[Penalty], factor: float, expected: float) -> None:
    old, new = normal(torch.zeros(1, 1), torch.ones(1, 1)), normal(torch.full((1, 1), 0.1), torch.ones(1, 1))
    distance = make().distance(old, new).item()
    region = make(coefficient=1.0, target=distance / factor)
    assert region.adapt(old, new)["coefficient"] == expected
    assert make(coefficient=1.0, target=None).adapt(old, new)["coefficient"] == 1.0


def test_penalty_is_the_mean_surrogate_less_the_weighted_distance() -> None:
    old, new = (normal(torch.randn(4, 1), torch.ones(4, 1)) for _ in range(2))
    ratio, advantage = torch.rand(4) + 0.5, torch.randn(4)
    expected = -(ratio * advantage).mean() + 3 * old.kl(new).mean()
    torch.testing.assert_close(KullbackLeibler(coefficient=3.0).loss(ratio, advantage, old, new), expected)


def test_clip_has_no_gradient_beyond_its_margin_and_only_there() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    unused: Distribution = normal(torch.zeros(5, 1), torch.ones(5, 1))
    (gradient,) = torch.autograd.grad(Clip(clip_range=0.2).loss(ratio, advantage, unused, unused), ratio)
    assert gradient.mul(-5).tolist() == pytest.approx([0.0, 1.0, -1.0, 0.0, 1.0])


def test_sigma_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`sigma` is the width of a kernel"):
        Correntropy(sigma=0.0)
