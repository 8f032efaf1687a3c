"""Proximal policy optimization, with the trust region as a part to choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.rl.base import Agent, Stateful
from lightning_prune.rl.distributions import Distribution
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.policies import POLICIES
from lightning_prune.rl.settings import chosen
from lightning_prune.rl.storage import Rollout
from lightning_prune.rl.transition import Transition
from lightning_prune.rl.trust_regions import TRUST_REGIONS

__all__ = ["PPO", "advantages_and_returns"]


def advantages_and_returns(
    batch: Transition, values: Tensor, next_values: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Return generalized advantage estimates, and the returns that the critic is to predict.

    Args:
        batch: Transitions in order, with shapes (steps, n, ...).
        values: (steps, n) value of each observation.
        next_values: (steps, n) value of each next observation.
        discount: The gamma of the paper, from 0 to 1.
        trace: The lambda of the paper, from 0 (one step ahead) to 1 (all of them).

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
    surprises = batch.reward + discount * next_values * (1 - batch.terminated) - values
    onward = discount * trace * (1 - torch.maximum(batch.terminated, batch.truncated))
    advantages = torch.empty_like(surprises)
    later = torch.zeros_like(surprises[0])
    for step in reversed(range(len(surprises))):
        later = surprises[step] + onward[step] * later
        advantages[step] = later
    return advantages, advantages + values


class PPO(Agent):
    """Improve a policy by several passes over what it has just experienced, kept near the policy that gathered it.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action; 1 for a categorical policy.
        seed: Seed of all random numbers.
        trust_region: ``clip``, ``kl``, ``cim``, ``cim-1`` or ``cim-2``; with settings as a mapping such as
            ``{"name": "cim", "sigma": 0.5}``.
        policy: ``gaussian``, ``categorical`` or ``bernoulli``; with settings as a mapping in the same way.
        hidden_sizes: Hidden layers of the policy's network, and of the critic's.
        rollout: Least number of transitions to learn from.
        passes: Passes over a rollout.
        batch_size: Transitions in a gradient step.
        learning_rate: Of Adam.
        discount: How much a reward counts if it comes one step later.
        trace: The lambda of generalized advantage estimation.
        value_weight: Weight of the critic's loss.
        entropy_weight: Reward for the entropy of the policy.
        max_grad_norm: Gradients are clipped to this norm.
        **settings: As for `Agent`.

    Note:
        Schulman et al., "Proximal Policy Optimization Algorithms" (2017), with the trust regions of that paper and of
        Guo et al. (2021), see `trust_regions`. Advantages are standardised in each gradient step.

    Example:
        >>> agent = PPO(observation_size=1, action_size=1, seed=0, trust_region="kl", rollout=64)
        >>> for _ in range(64):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, action.item(), [0.0], terminated=True))
        >>> sorted(agent.update())
        ['actor_loss', 'coefficient', 'critic_loss', 'distance', 'entropy']
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seed: int,
        *,
        trust_region: str | Mapping[str, Any] = "clip",
        policy: str | Mapping[str, Any] = "gaussian",
        hidden_sizes: Sequence[int] = (64, 64),
        rollout: int = 256,
        passes: int = 10,
        batch_size: int = 64,
        learning_rate: float = 3e-4,
        discount: float = 0.99,
        trace: float = 0.95,
        value_weight: float = 0.5,
        entropy_weight: float = 0.0,
        max_grad_norm: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        make_policy, policy_settings = chosen(POLICIES, policy, "policy")
        make_trust_region, trust_region_settings = chosen(TRUST_REGIONS, trust_region, "trust region")
        outputs = make_policy.outputs(self.low, self.high)
        network = mlp((self.input_size, *hidden_sizes, outputs), self.generator, nn.Tanh, output_gain=0.01)
        self.policy = make_policy(network, self.low, self.high, **policy_settings).to(self.device)
        self.critic = mlp((self.input_size, *hidden_sizes, 1), self.generator, nn.Tanh).to(self.device)
        self.trust_region = make_trust_region(**trust_region_settings)
        self.parameters = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, learning_rate, eps=1e-5, fused=True)
        self.memory = Rollout(self.layout)
        self.rollout, self.passes, self.batch_size = rollout, passes, batch_size
        self.discount, self.trace = discount, trace
        self.value_weight, self.entropy_weight, self.max_grad_norm = value_weight, entropy_weight, max_grad_norm

    @override
    def observe(self, transition: Transition) -> None:
        self.memory.add(transition)

    @override
    def update(self) -> dict[str, float]:
        if len(self.memory) < self.rollout:
            return {}
        experience = self._experience(self.memory.take())
        losses: list[Tensor] = []
        for _ in range(self.passes):
            shuffled = experience[torch.randperm(len(experience), generator=self.generator).to(self.device)]
            starts = range(0, len(experience), self.batch_size)
            losses += [self._step(shuffled[start : start + self.batch_size]) for start in starts]

        with torch.no_grad():
            new = self.policy(experience.inputs, experience.low, experience.high)
            figures = self.trust_region.adapt(experience.policy, new)
        means = torch.stack(losses).mean(0).tolist()
        return {**dict(zip(("actor_loss", "critic_loss", "entropy"), means, strict=True)), **figures}

    def _step(self, batch: "_Experience") -> Tensor:
        """Make one gradient step, and return the losses of actor and critic and the entropy."""
        policy = self.policy(batch.inputs, batch.low, batch.high)
        ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
        actor_loss = self.trust_region.loss(ratio, _standardised(batch.advantages), batch.policy, policy)
        critic_loss = (self.critic(batch.inputs).squeeze(-1) - batch.returns).square().mean()
        entropy = policy.entropy().mean()
        self.optimizer.zero_grad()
        (actor_loss + self.value_weight * critic_loss - self.entropy_weight * entropy).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        return torch.stack([actor_loss, critic_loss, entropy]).detach()

    @torch.no_grad()
    def _experience(self, batch: Transition) -> "_Experience":
        """Judge all transitions by the critic and the policy as they are now."""
        inputs = self._inputs(batch.observation, batch.epoch)
        values = self.critic(inputs).squeeze(-1)
        next_values = self.critic(self._inputs(batch.next_observation, batch.epoch)).squeeze(-1)
        advantages, returns = advantages_and_returns(batch, values, next_values, self.discount, self.trace)
        rows = (field.flatten(0, 1) for field in (inputs, batch.low, batch.high, batch.action))
        inputs, low, high, actions = rows
        policy = self.policy(inputs, low, high)
        log_probs = policy.log_prob(actions)
        return _Experience(inputs, low, high, actions, log_probs, advantages.flatten(), returns.flatten(), policy)

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, explore: bool, epoch: int) -> Tensor:
        distribution = self.policy(self._inputs(observation, epoch), low, high)
        return distribution.sample(self.exploration) if explore else distribution.mode()

    @override
    def _parts(self) -> dict[str, Stateful]:
        return {
            "policy": self.policy,
            "critic": self.critic,
            "optimizer": self.optimizer,
            "trust_region": self.trust_region,
            "memory": self.memory,
        }


@dataclass
class _Experience:
    """What a rollout teaches: rows of inputs and actions, and how they were judged when it was over."""

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

    def __getitem__(self, rows: Any) -> "_Experience":
        return _Experience(*(getattr(self, field.name)[rows] for field in fields(self)))


def _standardised(advantages: Tensor) -> Tensor:
    if len(advantages) == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
