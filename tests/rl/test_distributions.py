"""Distributions against torch.distributions, numerical integration and enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_prune.rl.distributions import Bernoulli, Categorical, Gaussian


def gaussian(n: int = 5, size: int = 3, low: float = -100.0, high: float = 100.0) -> Gaussian:
    mean, std = torch.randn(n, size), torch.rand(n, size) + 0.2
    return Gaussian(mean, std, torch.full((n, size), low), torch.full((n, size), high))


def categorical(n: int = 5, size: int = 4) -> Categorical:
    return Categorical(torch.randn(n, size), torch.zeros(n, 1), torch.full((n, 1), size - 1.0))


def bernoulli(n: int = 5, size: int = 3) -> Bernoulli:
    return Bernoulli(torch.randn(n, size), torch.zeros(n, size), torch.ones(n, size))


def test_gaussian_agrees_with_torch_far_from_its_bounds() -> None:
    ours, other = gaussian(), gaussian()
    theirs = torch.distributions.Independent(torch.distributions.Normal(ours.mean, ours.std), 1)
    their_other = torch.distributions.Independent(torch.distributions.Normal(other.mean, other.std), 1)
    action = theirs.sample()
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.kl(other), torch.distributions.kl_divergence(theirs, their_other))


def test_categorical_agrees_with_torch() -> None:
    ours, other = categorical(), categorical()
    theirs, their_other = (torch.distributions.Categorical(logits=one.logits) for one in (ours, other))
    action = theirs.sample()
    torch.testing.assert_close(ours.log_prob(action[:, None].float()), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.parameters(), theirs.probs)
    torch.testing.assert_close(ours.kl(other), torch.distributions.kl_divergence(theirs, their_other))


def test_bernoulli_agrees_with_torch() -> None:
    ours, other = bernoulli(), bernoulli()
    theirs, their_other = (
        torch.distributions.Independent(torch.distributions.Bernoulli(logits=one.logits), 1) for one in (ours, other)
    )
    action = torch.tensor([1.0, 1.0, 0.0]).expand(5, 3)  # two are 1, so it cannot stand for all zero
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.kl(other), torch.distributions.kl_divergence(theirs, their_other))


def test_density_and_probabilities_at_the_bounds_sum_to_one() -> None:
    low, high = torch.tensor([[-0.3]]), torch.tensor([[0.8]])
    policy = Gaussian(torch.tensor([[0.5]]), torch.tensor([[0.7]]), low, high)
    inside = torch.linspace(-0.3, 0.8, 20_001)[1:-1, None]
    total = torch.trapezoid(policy.log_prob(inside).exp(), inside[:, 0])
    total += policy.log_prob(low).exp().item() + policy.log_prob(high).exp().item()
    assert total.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("drawn", [20_000])
def test_draws_are_as_frequent_as_their_probability_says(drawn: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bounds = torch.zeros(1, 1), torch.full((1, 1), 3.0)
    classes = Categorical(torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(drawn, 4), *bounds)
    frequency = classes.sample(generator).long().flatten().bincount(minlength=4) / drawn
    torch.testing.assert_close(frequency, classes.parameters()[0], atol=0.015, rtol=0)
    clipped = Gaussian(torch.zeros(drawn, 1), torch.ones(drawn, 1), *bounds)
    at_zero = (clipped.sample(generator) == 0).float().mean()
    assert at_zero.item() == pytest.approx(clipped.log_prob(torch.zeros(1, 1))[0].exp().item(), abs=0.015)


def test_what_the_bounds_fix_has_probability_one_and_no_gradient() -> None:
    mean = torch.tensor([[0.2, 0.2]], requires_grad=True)
    fixed = torch.tensor([[0.6, 0.6]])
    log_prob = Gaussian(mean, torch.ones(1, 2), fixed, fixed).log_prob(fixed)
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert log_prob.item() == 0.0
    assert gradient.tolist() == [[0.0, 0.0]]


def test_log_prob_has_a_finite_gradient_far_beyond_a_bound() -> None:
    mean = torch.tensor([[60.0]], requires_grad=True)
    low, high = torch.zeros(1, 1), torch.ones(1, 1)
    for action in (low, (low + high) / 2, high):
        (gradient,) = torch.autograd.grad(Gaussian(mean, torch.ones(1, 1), low, high).log_prob(action).sum(), mean)
        assert gradient.isfinite().all()


def all_subsets(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)))


@pytest.mark.parametrize("must_be_one", [0.0, 1.0])
def test_probabilities_of_all_subsets_sum_to_one_and_none_has_any_chance(must_be_one: float) -> None:
    low, high = torch.zeros(1, 4), torch.ones(1, 4)
    low[0, 1], high[0, 2] = must_be_one, 0.0
    policy = Bernoulli(torch.randn(1, 4), low, high)
    possible = torch.stack([subset for subset in all_subsets(4) if subset.any() and (subset <= high[0]).all()])
    possible = possible[(possible >= low).all(1)]
    assert policy.log_prob(possible).exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    drawn = Bernoulli(policy.logits.expand(2000, 4) - 2, low, high).sample(torch.Generator().manual_seed(0))
    assert drawn.any(1).all()
    assert (drawn >= low).all()
    assert (drawn <= high).all()


def test_classes_out_of_bounds_are_never_drawn_and_the_divergence_is_finite() -> None:
    low, high = torch.ones(500, 1), torch.full((500, 1), 2.0)
    policy, other = (Categorical(torch.randn(500, 4), low, high) for _ in range(2))
    assert set(policy.sample(torch.Generator().manual_seed(0)).flatten().tolist()) == {1.0, 2.0}
    assert policy.kl(other).isfinite().all()
    assert (policy.kl(other) >= -1e-6).all()


@pytest.mark.parametrize("make", [gaussian, categorical, bernoulli])
def test_rows_of_a_batch_are_distributions_of_their_own(make) -> None:
    batch = make()
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(batch[rows].entropy(), batch.entropy()[rows])
    torch.testing.assert_close(batch[rows].mode(), batch.mode()[rows])
