"""REINFORCE: the mean of its estimates over all possible samples against the true gradient."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.rl import Reinforce, Transition
from lightning_prune.rl.reinforce import leave_one_out_baseline, mean_baseline, no_baseline

CHANNELS = 3
SUBSETS = torch.tensor([subset for subset in itertools.product((0.0, 1.0), repeat=CHANNELS) if any(subset)])
REWARDS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.7, -1.0, 0.9])  # of each subset


def gradient(agent: Reinforce, objective: Tensor) -> Tensor:
    return torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(objective, list(agent.policy.parameters()))]
    )


def estimate(agent: Reinforce, picks: tuple[int, ...]) -> Tensor:
    """Return the gradient that `update` descends for these samples."""
    chosen = list(picks)
    agent.observe(Transition([1.0], SUBSETS[chosen], REWARDS[chosen], [1.0], terminated=True))
    agent.update()
    return torch.cat([parameter.grad.flatten() for parameter in agent.policy.parameters()])


@pytest.mark.parametrize(("baseline", "share"), [("none", 1.0), ("leave-one-out", 1.0), ("mean", 0.5)])
def test_estimates_are_unbiased_over_all_pairs_of_samples(baseline: str, share: float) -> None:
    network = nn.Linear(1, CHANNELS)
    agent = Reinforce(1, CHANNELS, 0, network=network, n_episodes=2, baseline=baseline, learning_rate=0.0)
    log_probs = agent.policy(torch.ones(1, 1), agent.low, agent.high).log_prob(SUBSETS)
    probabilities = log_probs.detach().exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-6)
    expected = gradient(agent, (log_probs.exp() * REWARDS).sum())

    mean = torch.zeros_like(expected)
    for picks in itertools.product(range(len(SUBSETS)), repeat=2):
        mean -= probabilities[list(picks)].prod() * estimate(agent, picks)
    torch.testing.assert_close(mean, share * expected, rtol=1e-4, atol=1e-6)


def test_leaving_one_out_varies_less_than_no_baseline() -> None:
    returns = 10 + torch.randn(1000, 4)
    spread = {make: torch.stack([make(row) for row in returns]).var() for make in (no_baseline, leave_one_out_baseline)}
    raw = (returns**2).mean()
    assert spread[leave_one_out_baseline] < 0.05 * raw
    torch.testing.assert_close(mean_baseline(returns[0]), 0.75 * leave_one_out_baseline(returns[0]))


def test_an_episode_of_several_steps_counts_once() -> None:
    def agent() -> Reinforce:
        return Reinforce(1, 1, 0, policy="gaussian", n_episodes=2, learning_rate=0.0)

    ours = agent()
    episodes = [[(0.1, 0.4, 0.0), (0.2, 0.7, 1.0)], [(0.3, 0.2, 0.5), (0.5, 0.9, 2.0)]]
    for episode in episodes:
        for place, (observation, action, reward) in enumerate(episode):
            assert ours.update() == {}
            ours.observe(Transition([observation], [action], reward, [0.0], terminated=place == 1))
    ours.update()

    other = agent()
    log_probs = []
    for episode in episodes:
        steps = [other.policy(torch.tensor([[step[0]]]), other.low, other.high) for step in episode]
        log_probs.append(sum(one.log_prob(torch.tensor([[step[1]]])) for one, step in zip(steps, episode, strict=True)))
    loss = -((1.0 - 2.5) * log_probs[0] + (2.5 - 1.0) * log_probs[1]) / 2
    expected = gradient(other, loss.sum())
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in ours.policy.parameters()]), expected)


def test_many_draws_for_one_observation_evaluate_the_network_once() -> None:
    rows = []

    class Counting(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            rows.append(len(inputs.reshape(-1, inputs.shape[-1])))
            return super().forward(inputs)

    agent = Reinforce(4, 2, 0, network=Counting(4, 2), n_episodes=5)
    actions = agent.act(torch.ones(4), low=torch.zeros(5, 2))
    agent.observe(Transition(torch.ones(4), actions, actions.sum(1), torch.ones(4), terminated=True))
    assert agent.update()
    assert actions.shape == (5, 2)
    assert rows == [1, 1]


def test_initial_probability() -> None:
    agent = Reinforce(1, 1000, 0, policy={"name": "bernoulli", "initial_probability": 0.9})
    assert agent.act([0.0]).mean().item() == pytest.approx(0.9, abs=0.03)


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match="at least 2 `n_episodes`"):
        Reinforce(1, 1, 0, n_episodes=1)
    with pytest.raises(ValueError, match="no baseline 'median'"):
        Reinforce(1, 1, 0, baseline="median")
    with pytest.raises(ValueError, match="must end together"):
        Reinforce(1, 1, 0).observe(Transition([0.0], [[0.0], [1.0]], [0.0, 1.0], [0.0], terminated=[True, False]))
