"""PPO: advantages against a naive loop, and one gradient step against the paper's formula."""

import pytest
import torch

from lightning_prune.rl import PPO, Transition
from lightning_prune.rl.ppo import advantages_and_returns


def naive_advantages(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    advantages = []
    for start in range(len(rewards)):
        total, weight = 0.0, 1.0
        for step in range(start, len(rewards)):
            onward = 0.0 if terminated[step] else next_values[step]
            total += weight * (rewards[step] + gamma * onward - values[step])
            if terminated[step] or truncated[step]:
                break
            weight *= gamma * gae_lambda
        advantages.append(total)
    return advantages


def test_advantages_against_a_naive_loop() -> None:
    steps, n = 30, 4
    reward, values, next_values = (torch.randn(steps, n, dtype=torch.float64) for _ in range(3))
    terminated, truncated = ((torch.rand(steps, n) < 0.15).double() for _ in range(2))
    batch = Transition(None, None, reward, None, terminated, truncated)
    advantages, returns = advantages_and_returns(batch, values, next_values, gamma=0.97, gae_lambda=0.9)
    for column in range(n):
        fields = (field[:, column].tolist() for field in (reward, values, next_values, terminated, truncated))
        expected = naive_advantages(*fields, 0.97, 0.9)
        torch.testing.assert_close(advantages[:, column], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)


def test_a_truncated_episode_goes_on_from_its_own_next_observation() -> None:
    agent = PPO(1, 1, seed=0, rollout_size=1, gamma=0.5)
    agent.observe(Transition([0.1], [0.5], 2.0, [0.9], terminated=False, truncated=True))
    rollout = agent._judged(agent.rollout_buffer.take())
    value, onward = agent.critic(torch.tensor([[0.1]])), agent.critic(torch.tensor([[0.9]]))
    torch.testing.assert_close(rollout.advantages, (2.0 + 0.5 * onward - value).flatten())


def test_first_gradient_of_the_actor_is_the_policy_gradient() -> None:
    """At the old policy all trust regions have the gradient of E[log pi * standardised advantage]."""
    steps = [(0.1, 0.3, 1.0), (0.4, 0.9, -1.0), (0.2, 0.6, 0.5), (0.8, 0.1, 0.0)]
    gradients = {}
    for name in ("clip", "kl", "cim", "cim-1", "cim-2"):
        agent = PPO(1, 1, 0, trust_region=name, rollout_size=4, n_epochs=1, batch_size=4, max_grad_norm=1e9)
        inputs = torch.tensor([[step[0]] for step in steps])
        actions = torch.tensor([[step[1]] for step in steps])
        advantages = torch.tensor([step[2] for step in steps]) - agent.critic(inputs).detach().squeeze(-1)
        standardised = (advantages - advantages.mean()) / advantages.std()
        log_prob = agent.policy(inputs, torch.zeros(4, 1), torch.ones(4, 1)).log_prob(actions)
        expected = torch.autograd.grad(-(log_prob * standardised).mean(), list(agent.policy.parameters()))
        for observation, action, reward in steps:
            agent.observe(Transition([observation], [action], reward, [0.0], terminated=True))
        agent.update()
        gradients[name] = [parameter.grad for parameter in agent.policy.parameters()]
        for ours, theirs in zip(gradients[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_transitions_wait_until_there_are_enough() -> None:
    agent = PPO(1, 1, 0, rollout_size=6)
    for _ in range(2):
        agent.observe(Transition(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 1), [False] * 3))
        figures = agent.update() if len(agent.rollout_buffer) == 3 else None
        assert figures in ({}, None)
    assert agent.update()
    assert len(agent.rollout_buffer) == 0


@pytest.mark.parametrize("trust_region", ["clip", "kl", "cim", "cim-1", "cim-2"])
def test_categorical_policy_finds_the_best_class(trust_region: str) -> None:
    agent = PPO(1, 1, 0, high=3.0, policy="categorical", trust_region=trust_region, rollout_size=64, learning_rate=3e-3)
    for _ in range(6):
        actions = agent.act(torch.zeros(64, 1))
        rewards = (actions == 2).float().squeeze(1)
        agent.observe(Transition(torch.zeros(64, 1), actions, rewards, torch.zeros(64, 1), [True] * 64))
        agent.update()
    assert agent.act([0.0], greedy=True).item() == 2
    assert (agent.act(torch.zeros(500, 1)) == 2).float().mean() > 0.5  # chance is 0.25


def test_the_number_of_environments_cannot_change_within_a_rollout() -> None:
    agent = PPO(1, 1, 0)
    agent.observe(Transition([0.0], [0.0], 0.0, [0.0], False))
    with pytest.raises(ValueError, match="call update"):
        agent.observe(Transition(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1), [False] * 2))


def test_a_categorical_policy_needs_classes_from_zero() -> None:
    with pytest.raises(ValueError, match="`low` 0"):
        PPO(1, 1, 0, low=1.0, high=3.0, policy="categorical")
