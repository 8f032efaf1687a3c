"""SAC: the density of squashed draws, what the critics are told, and the weight of the entropy."""

import math

import pytest
import torch

from lightning_prune.rl import SAC, Transition
from lightning_prune.rl.sac import squash

LOW, HIGH = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0])


def test_density_of_squashed_draws_agrees_with_torch() -> None:
    mean, log_std = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    raw = mean + log_std.exp() * torch.randn(7, 2, dtype=torch.float64)
    middle, half = (LOW + HIGH) / 2, (HIGH - LOW) / 2
    transforms = [torch.distributions.TanhTransform(), torch.distributions.AffineTransform(middle, half)]
    theirs = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), transforms
    ).log_prob(middle + half * raw.tanh())
    action, log_prob = squash(raw, mean, log_std, LOW, HIGH)
    torch.testing.assert_close(action, middle + half * raw.tanh())
    torch.testing.assert_close(log_prob, theirs.sum(-1), rtol=1e-6, atol=1e-6)


def test_density_of_squashed_draws_integrates_to_one() -> None:
    raw = torch.linspace(-12, 12, 40_001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(raw, 0.3), torch.full_like(raw, -0.2)
    action, log_prob = squash(raw, mean, log_std, torch.zeros(1), torch.ones(1))
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1.0, abs=1e-6)


def test_density_is_finite_where_tanh_is_one() -> None:
    raw = torch.tensor([[40.0]], requires_grad=True)
    _, log_prob = squash(raw, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1))
    assert log_prob.isfinite().all()
    assert torch.autograd.grad(log_prob.sum(), raw)[0].isfinite().all()


def agent_with(transition: Transition, **settings: object) -> SAC:
    agent = SAC(2, 1, seed=0, learning_starts=0, hidden_sizes=(8,), **settings)
    agent.observe(transition)
    return agent


@pytest.mark.parametrize("terminated", [False, True])
def test_critics_are_told_the_soft_bellman_target_at_the_executed_next_action(terminated: bool) -> None:
    step = Transition([0.1, 0.2], [0.3], 1.5, [0.4, 0.5], terminated, next_low=[0.7], next_high=[0.7])
    agent = agent_with(step, gamma=0.9, ent_coef=0.2)
    batch = agent.replay_buffer.sample(1, agent.generator)
    state = agent.generator.get_state()
    target = agent._target_value(batch)

    mean, log_std = agent.actor(batch.next_observation)
    noise = torch.randn(1, 1, generator=agent.generator.set_state(state))
    normal = torch.distributions.Normal(mean, log_std.exp())
    raw = mean + log_std.exp() * noise
    log_prob = normal.log_prob(raw) - torch.log(0.5 * (1 - raw.tanh() ** 2))
    joined = torch.tensor([[0.4, 0.5, 0.7]])  # 0.7 is all that may be done next
    value = torch.minimum(*(critic(joined) for critic in agent.targets)) - 0.2 * log_prob
    torch.testing.assert_close(target, (1.5 + (1 - terminated) * 0.9 * value).flatten())


def test_actor_finds_back_from_an_action_out_of_bounds() -> None:
    agent = agent_with(Transition([0.0, 0.0], [0.2], 0.0, [0.0, 0.0], terminated=True))
    action, _ = agent._sample(torch.zeros(1, 2), torch.zeros(1, 1), torch.full((1, 1), 0.01), agent.generator)
    gradients = torch.autograd.grad(action.sum(), list(agent.actor.parameters()))
    assert action.item() == pytest.approx(0.01)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_targets_follow_slowly_and_get_no_gradient() -> None:
    agent = agent_with(Transition([0.1, 0.2], [0.3], 1.5, [0.4, 0.5], terminated=True), tau=0.1)
    before = [parameter.clone() for parameter in agent.targets.parameters()]
    agent.update()
    for old, target, source in zip(before, agent.targets.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * source)
        assert target.grad is None


def test_learned_alpha_rises_where_entropy_is_too_low_and_falls_where_it_is_too_high() -> None:
    agent = SAC(1, 1, 0, low=0.0, high=4.0, ent_coef="auto")
    wanted = -1 + math.log(2)  # -1 in multiples of half the range, in which draws are twice as dense
    for entropy, expected in ((wanted - 0.1, 1), (wanted + 0.1, -1)):
        before = agent.alpha.value.item()
        for _ in range(20):  # more than Adam's momentum lasts
            agent.alpha.update(torch.tensor([-entropy]))
        assert math.copysign(1, agent.alpha.value.item() - before) == expected


def test_warm_up_draws_uniformly_within_the_bounds() -> None:
    agent = SAC(1, 1, 0, learning_starts=10)
    actions = agent.act(torch.zeros(4000, 1), low=[0.2], high=[0.6])
    assert actions.mean().item() == pytest.approx(0.4, abs=0.01)
    assert actions.var().item() == pytest.approx(0.4**2 / 12, rel=0.1)
    assert agent.update() == {}
