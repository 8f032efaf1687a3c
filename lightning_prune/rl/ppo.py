"""Proximal policy optimization (PPO), with the trust region to choose.

A rollout is gathered by the policy as it is. Generalized advantage estimation says how much better each action was than
the critic expected. Then the policy is improved in several passes over the rollout, in minibatches: the loss of the
trust region raises the probability of actions of a positive advantage while the new policy is kept near the old one,
and the critic learns to predict the returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.rl.agent import Agent, AgentSettings
from lightning_prune.rl.buffers import RolloutBuffer
from lightning_prune.rl.checkpointed import Stateful
from lightning_prune.rl.distributions import Distribution
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.policies import POLICIES
from lightning_prune.rl.rows import Rows
from lightning_prune.rl.selection import select
from lightning_prune.rl.transitions import Transition
from lightning_prune.rl.trust_regions import TRUST_REGIONS

__all__ = ["PPO", "PPOSettings", "advantages_and_returns"]


@dataclass(kw_only=True)
class PPOSettings(AgentSettings):
    """Settings of PPO, with the names of Stable-Baselines3."""

    trust_region: str | Mapping[str, Any] = "clip"
    """``clip``, ``kl``, ``cim``, ``cim-1`` or ``cim-2``; with settings as a mapping such as
    ``{"name": "cim", "sigma": 0.5}``."""
    policy: str | Mapping[str, Any] = "gaussian"
    """``gaussian``, ``categorical`` or ``bernoulli``; with settings as a mapping in the same way."""
    hidden_sizes: Sequence[int] = (64, 64)
    """Hidden layers of the policy's network, and of the critic's."""
    rollout_size: int = 256
    """Least number of transitions to learn from, over all environments."""
    n_epochs: int = 10
    """Passes over a rollout."""
    batch_size: int = 64
    """Transitions in a gradient step."""
    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    gamma: float = 0.99
    """How much a reward counts if it comes one step later, from 0 to 1."""
    gae_lambda: float = 0.95
    """The lambda of generalized advantage estimation, from 0 (one step ahead) to 1 (all of them)."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    ent_coef: float = 0.0
    """Weight of the policy's entropy, which is rewarded."""
    max_grad_norm: float = 0.5
    """Norm that gradients are clipped to."""


class PPO(Agent):
    """Improve a policy by several passes over what it has just experienced, kept near the policy that gathered it.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action; 1 for a categorical policy.
        seed: Seed of all random numbers.
        **settings: As for `PPOSettings`.

    Note:
        Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the trust regions of that paper and of
        Guo et al. (2021), see `trust_regions`. Advantages are standardised in each gradient step.

    Example:
        >>> agent = PPO(observation_size=1, action_size=1, seed=0, trust_region="kl", rollout_size=64)
        >>> for _ in range(64):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, action.item(), [0.0], terminated=True))
        >>> sorted(agent.update())
        ['actor_loss', 'coefficient', 'critic_loss', 'distance', 'entropy']
    """

    settings_type = PPOSettings
    settings: PPOSettings

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        policy_class, policy_settings = select(POLICIES, self.settings.policy, "policy")
        region_class, region_settings = select(TRUST_REGIONS, self.settings.trust_region, "trust region")
        hidden_sizes = self.settings.hidden_sizes
        policy_sizes = (self.input_size, *hidden_sizes, policy_class.outputs(self.low, self.high))
        critic_sizes = (self.input_size, *hidden_sizes, 1)
        policy_network = mlp(policy_sizes, self.generator, nn.Tanh, output_gain=0.01)
        self.policy = policy_class(policy_network, self.low, self.high, **policy_settings).to(self.device)
        self.critic = mlp(critic_sizes, self.generator, nn.Tanh).to(self.device)
        self.trust_region = region_class(**region_settings)
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, self.settings.learning_rate, eps=1e-5, fused=True)
        self.rollout_buffer = RolloutBuffer(self.layout)

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        distribution = self.policy(self._inputs(observation, epoch), low, high)
        return distribution.mode() if greedy else distribution.sample(self.exploration)

    @override
    def observe(self, transition: Transition) -> None:
        self.rollout_buffer.add(transition)

    @override
    def update(self) -> dict[str, float]:
        if len(self.rollout_buffer) < self.settings.rollout_size:
            return {}
        rollout = self._judged(self.rollout_buffer.take())
        losses: list[Tensor] = []
        for _ in range(self.settings.n_epochs):
            for minibatch in self._minibatches(rollout):
                losses.append(self._gradient_step(minibatch))  # noqa: PERF401 - reads as the algorithm

        actor_loss, critic_loss, entropy = torch.stack(losses).mean(0).tolist()
        return {
            "actor_loss": actor_loss,
            "critic_loss": critic_loss,
            "entropy": entropy,
            **self._adapt_trust_region(rollout),
        }

    @torch.no_grad()
    def _judged(self, batch: Transition) -> "JudgedRollout":
        """Judge all transitions of a rollout by the critic and the policy as they are now."""
        inputs = self._inputs(batch.observation, batch.epoch)  # (steps, environments, input)
        next_inputs = self._inputs(batch.next_observation, batch.epoch)
        values = self.critic(inputs).squeeze(-1)
        next_values = self.critic(next_inputs).squeeze(-1)
        advantages, returns = advantages_and_returns(
            batch, values, next_values, self.settings.gamma, self.settings.gae_lambda
        )
        inputs = inputs.flatten(0, 1)  # (steps * environments, input), and so on
        low = batch.low.flatten(0, 1)
        high = batch.high.flatten(0, 1)
        actions = batch.action.flatten(0, 1)
        policy = self.policy(inputs, low, high)
        return JudgedRollout(
            inputs=inputs,
            low=low,
            high=high,
            actions=actions,
            log_probs=policy.log_prob(actions),
            advantages=advantages.flatten(),
            returns=returns.flatten(),
            policy=policy,
        )

    def _minibatches(self, rollout: "JudgedRollout") -> Iterator["JudgedRollout"]:
        """Go through a rollout once, in random order."""
        order = torch.randperm(len(rollout), generator=self.generator)
        shuffled = rollout[order.to(self.device)]
        batch_size = self.settings.batch_size
        for start in range(0, len(rollout), batch_size):
            yield shuffled[start : start + batch_size]

    def _gradient_step(self, batch: "JudgedRollout") -> Tensor:
        """Make one gradient step, and return the losses of actor and critic and the entropy, (3,)."""
        policy = self.policy(batch.inputs, batch.low, batch.high)
        ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
        advantages = _standardised(batch.advantages)
        actor_loss = self.trust_region.loss(ratio, advantages, batch.policy, policy)
        values = self.critic(batch.inputs).squeeze(-1)
        critic_loss = (values - batch.returns).square().mean()
        entropy = policy.entropy().mean()
        loss = actor_loss + self.settings.vf_coef * critic_loss - self.settings.ent_coef * entropy

        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        return torch.stack([actor_loss, critic_loss, entropy]).detach()

    @torch.no_grad()
    def _adapt_trust_region(self, rollout: "JudgedRollout") -> dict[str, float]:
        new_policy = self.policy(rollout.inputs, rollout.low, rollout.high)
        return self.trust_region.adapt(rollout.policy, new_policy)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {  # the keys are those of saved checkpoints
            "policy": self.policy,
            "critic": self.critic,
            "optimizer": self.optimizer,
            "trust_region": self.trust_region,
            "memory": self.rollout_buffer,
        }


@dataclass
class JudgedRollout(Rows):
    """A rollout as rows, and how it was judged when it was over.

    Args:
        inputs: (n, input) observations, with the representation of the environment.
        low: (n, action) least action allowed.
        high: (n, action) greatest action allowed.
        actions: (n, action) what was executed.
        log_probs: (n,) its log-probability under the policy that gathered the rollout.
        advantages: (n,) how much better it was than expected.
        returns: (n,) what the critic is to predict.
        policy: The n distributions of the policy that gathered the rollout.
    """

    inputs: Tensor
    low: Tensor
    high: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    policy: Distribution

    def __len__(self) -> int:
        return len(self.inputs)


def advantages_and_returns(
    batch: Transition, values: Tensor, next_values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return generalized advantage estimates, and the returns that the critic is to predict.

    Args:
        batch: Transitions in order, with shapes (steps, n, ...).
        values: (steps, n) value of each observation.
        next_values: (steps, n) value of each next observation.
        gamma: How much a reward counts if it comes one step later, from 0 to 1.
        gae_lambda: The lambda of the paper, from 0 (one step ahead) to 1 (all of them).

    Returns:
        The (steps, n) advantages and the (steps, n) returns.

    Note:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016).

    Example:
        >>> batch = Transition(None, None, torch.tensor([[1.0], [1.0]]), None, torch.tensor([[0.0], [1.0]]),
        ...                    truncated=torch.zeros(2, 1))
        >>> advantages, returns = advantages_and_returns(batch, torch.zeros(2, 1), torch.zeros(2, 1), 0.5, 1.0)
        >>> advantages.flatten()  # 1 + 0.5 and 1
        tensor([1.5000, 1.0000])
    """
    ended = torch.maximum(batch.terminated, batch.truncated)
    deltas = batch.reward + gamma * next_values * (1 - batch.terminated) - values
    weights_of_next = gamma * gae_lambda * (1 - ended)
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(deltas[0])
    for step in reversed(range(len(deltas))):
        advantage = deltas[step] + weights_of_next[step] * advantage
        advantages[step] = advantage
    return advantages, advantages + values


def _standardised(advantages: Tensor) -> Tensor:
    if len(advantages) == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
