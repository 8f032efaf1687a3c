"""Soft actor-critic (SAC): off-policy learning of continuous actions.

There are a policy pi, two critics Q1 and Q2 that predict what an action earns, and a slow copy of each critic, its
target. From a batch of past steps, with rewards r, observations s and the next ones s', an update

1. moves both critics towards ``r + gamma (1 - terminated) (min of targets(s', a') - alpha log pi(a'|s'))``, with a'
   sampled from the policy,
2. moves the policy towards less of ``alpha log pi(a|s) - min of critics(s, a)``, with a sampled from the policy,
3. moves a learned alpha to where the entropy of the policy is at its target,
4. moves the targets by the share tau towards the critics.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_prune.rl.agent import Agent, AgentSettings
from lightning_prune.rl.buffers import ReplayBuffer
from lightning_prune.rl.checkpointed import Stateful
from lightning_prune.rl.networks import gradient_step, mlp
from lightning_prune.rl.sampling import clip, normal_noise
from lightning_prune.rl.transitions import Transition

__all__ = ["SAC", "SACSettings", "squash"]

LOG_STD_RANGE = (-20, 2)


@dataclass(kw_only=True)
class SACSettings(AgentSettings):
    """Settings of SAC, with the names of Stable-Baselines3."""

    hidden_sizes: Sequence[int] = (300, 300)
    """Hidden layers of the actor and the critics."""
    ent_coef: float | str = 0.1
    """Weight of the entropy, the alpha of the paper; ``"auto"`` finds the one that keeps the entropy at minus the size
    of the action, measured in multiples of half the range of actions."""
    actor_learning_rate: float = 1e-4
    """Learning rate of Adam for the actor."""
    critic_learning_rate: float = 1e-3
    """Learning rate of Adam for the critics and a learned alpha."""
    gamma: float = 0.99
    """How much a reward counts if it comes one step later, from 0 to 1."""
    tau: float = 0.005
    """Share of the critics that their targets take over in each update, from 0 to 1."""
    batch_size: int = 64
    """Transitions in a gradient step."""
    buffer_size: int = 10_000
    """Transitions in the replay buffer."""
    learning_starts: int = 100
    """Number of transitions for which actions are drawn uniformly within their bounds and nothing is learned."""


class Actor(nn.Sequential):
    """A perceptron that describes the policy before it is squashed into the range of actions."""

    @override
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the std of a normal distribution for (n, inputs), (n, action) each."""
        mean, log_std = super().forward(inputs).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)


class TwinCritics(nn.ModuleList):
    """Two perceptrons, each of which predicts what an action earns."""

    @override
    def forward(self, inputs: Tensor, action: Tensor) -> Tensor:
        """Return what both predict for (n, inputs) and (n, action), as (2, n)."""
        joined = torch.cat([inputs, action], dim=-1)
        values = [critic(joined).squeeze(-1) for critic in self]
        return torch.stack(values)

    def least(self, inputs: Tensor, action: Tensor) -> Tensor:
        """Return the lesser of both predictions, (n,)."""
        first, second = self(inputs, action)
        return torch.minimum(first, second)


class SAC(Agent):
    """Learn a stochastic policy that earns much and remains random, from a buffer of past steps.

    The buffer holds actions as they were executed, and the bounds of each step: where the critics judge an action of
    the policy, they judge what would be executed of it.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        **settings: As for `SACSettings`.

    Note:
        Haarnoja et al., "Soft Actor-Critic Algorithms and Applications" (2018). The defaults, but for
        `learning_starts`, are those that a reproduction of Ganjdanesh et al. (CVPR 2024) states, where alpha is fixed
        at 0.1. Clipping to the bounds of a step is passed straight through by the gradient of the actor (an
        interpretation), so that an action out of bounds can find its way back.

    Example:
        >>> agent = SAC(observation_size=1, action_size=1, seed=0, learning_starts=64)
        >>> for _ in range(64):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, action.item(), [0.0], terminated=True))
        >>> sorted(agent.update())
        ['actor_loss', 'critic_loss', 'ent_coef', 'entropy']
    """

    settings_type = SACSettings
    settings: SACSettings

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        hidden_sizes = self.settings.hidden_sizes
        actor_sizes = (self.input_size, *hidden_sizes, 2 * action_size)
        critic_sizes = (self.input_size + action_size, *hidden_sizes, 1)
        self.actor = Actor(*mlp(actor_sizes, self.generator, output_gain=0.01)).to(self.device)
        self.critics = TwinCritics(mlp(critic_sizes, self.generator) for _ in range(2)).to(self.device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), self.settings.actor_learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(
            self.critics.parameters(), self.settings.critic_learning_rate, fused=True
        )
        self.alpha = self._make_alpha()
        self.replay_buffer = ReplayBuffer(self.layout, self.settings.buffer_size)

    # -- acting ----------------------------------------------------------------------------------------------------

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        if not greedy and not self._learning_has_started:
            return self._uniform(observation, low, high)
        inputs = self._inputs(observation, epoch)
        if greedy:
            return clip(self._greedy(inputs), low, high)
        action, _ = self._sample(inputs, low, high, self.exploration)
        return action

    def _greedy(self, inputs: Tensor) -> Tensor:
        """Return the actions at the middle of the policy, (n, action) within the range of the agent."""
        mean, _ = self.actor(inputs)
        half_range = (self.high - self.low) / 2
        return self.low + half_range * (1 + mean.tanh())

    def _sample(self, inputs: Tensor, low: Tensor, high: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return actions as they would be executed, (n, action), and their log-density before clipping, (n,)."""
        mean, log_std = self.actor(inputs)
        noise = normal_noise(generator, mean, low, high)
        raw = mean + log_std.exp() * noise
        action, log_prob = squash(raw, mean, log_std, self.low, self.high)
        executed = clip(action, low, high).detach()
        gradient_only = action - action.detach()  # 0, with the gradient of the action before clipping
        return executed + gradient_only, log_prob

    # -- learning --------------------------------------------------------------------------------------------------

    @property
    def _learning_has_started(self) -> bool:
        return self.replay_buffer.count >= self.settings.learning_starts

    @override
    def observe(self, transition: Transition) -> None:
        self.replay_buffer.add(transition)

    @override
    def update(self) -> dict[str, float]:
        if not self._learning_has_started or not len(self.replay_buffer):
            return {}
        batch = self.replay_buffer.sample(self.settings.batch_size, self.generator)
        inputs = self._inputs(batch.observation, batch.epoch)  # (batch, observation + context)

        critic_loss = self._critic_loss(batch, inputs)
        gradient_step(self.critic_optimizer, critic_loss)

        actor_loss, log_prob = self._actor_loss(batch, inputs)
        gradient_step(self.actor_optimizer, actor_loss)

        self.alpha.update(log_prob.detach())
        self._update_targets()

        figures = torch.stack([critic_loss, actor_loss, log_prob.mean()])
        critic_figure, actor_figure, mean_log_prob = figures.tolist()  # waits for a GPU once
        return {
            "critic_loss": critic_figure,
            "actor_loss": actor_figure,
            "entropy": -mean_log_prob,
            "ent_coef": float(self.alpha.value),
        }

    def _critic_loss(self, batch: Transition, inputs: Tensor) -> Tensor:
        target = self._target_value(batch)  # (batch,)
        errors = self.critics(inputs, batch.action) - target  # (2, batch)
        return 0.5 * errors.square().mean(1).sum()

    @torch.no_grad()
    def _target_value(self, batch: Transition) -> Tensor:
        """Return the (n,) values that the critics are to predict."""
        next_inputs = self._inputs(batch.next_observation, batch.epoch)
        next_action, log_prob = self._sample(next_inputs, batch.next_low, batch.next_high, self.generator)
        next_value = self.targets.least(next_inputs, next_action)
        soft_value = next_value - self.alpha.value * log_prob
        weight_of_next = self.settings.gamma * (1 - batch.terminated)
        return batch.reward + weight_of_next * soft_value

    def _actor_loss(self, batch: Transition, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the actor, and the (n,) log-density of the actions that it is about."""
        action, log_prob = self._sample(inputs, batch.low, batch.high, self.generator)
        value = self.critics.least(inputs, action)
        losses = self.alpha.value * log_prob - value
        return losses.mean(), log_prob

    @torch.no_grad()
    def _update_targets(self) -> None:
        for target, source in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            target.lerp_(source, self.settings.tau)

    def _make_alpha(self) -> "FixedAlpha | LearnedAlpha":
        ent_coef = self.settings.ent_coef
        if ent_coef != "auto":
            return FixedAlpha(float(ent_coef))
        # Minus the size of the action is meant for actions from -1 to 1; the log of half the range rescales it.
        half_range = (self.high - self.low) / 2
        target_entropy = float(half_range.log().sum()) - self.action_size
        return LearnedAlpha(target_entropy, self.settings.critic_learning_rate, self.device)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {  # the keys are those of saved checkpoints
            "actor": self.actor,
            "critics": self.critics,
            "targets": self.targets,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature": self.alpha,
            "memory": self.replay_buffer,
        }


class FixedAlpha:
    """Weigh the entropy by a constant.

    Args:
        value: The weight.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, log_prob: Tensor) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the value is a setting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing over."""


class LearnedAlpha:
    """Weigh the entropy by what keeps it at a target.

    Args:
        target_entropy: The entropy wanted, in nats.
        learning_rate: Of Adam.
        device: Where it is kept.
    """

    def __init__(self, target_entropy: float, learning_rate: float, device: torch.device) -> None:
        self.target_entropy = target_entropy
        self.log_alpha = torch.zeros(1, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], learning_rate, fused=True)

    @property
    def value(self) -> Tensor:
        """The weight, (1,)."""
        return self.log_alpha.detach().exp()

    def update(self, log_prob: Tensor) -> None:
        """Raise the weight if the policy has too little entropy, else lower it.

        Args:
            log_prob: (n,) log-density of actions of the policy.
        """
        loss = -self.log_alpha * (log_prob.mean() + self.target_entropy)
        gradient_step(self.optimizer, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"log_value": self.log_alpha.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        self.log_alpha.data.copy_(state["log_value"])
        self.optimizer.load_state_dict(state["optimizer"])


def squash(raw: Tensor, mean: Tensor, log_std: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Map draws of a normal distribution into a box by tanh, and return the log-density there.

    Args:
        raw: (n, action) draws from the normal distribution.
        mean: (n, action) its mean.
        log_std: (n, action) logarithm of its std.
        low: (action,) least action of the box.
        high: (action,) greatest action.

    Returns:
        The (n, action) actions, and the (n,) logarithm of their density.

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> action, log_prob = squash(zero, zero, zero, torch.zeros(1), torch.ones(1))
        >>> action, log_prob.exp()  # the density at the middle is 1 / sqrt(2 pi), stretched by 2 from raw to action
        (tensor([[0.5000]]), tensor([0.7979]))
    """
    half_range = (high - low) / 2
    deviation = (raw - mean) / log_std.exp()
    raw_log_density = -0.5 * deviation.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(raw)^2), in a form that is accurate also where tanh is 1 to the last digit
    log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
    log_stretch = log_slope + half_range.log()
    action = low + half_range * (1 + raw.tanh())
    return action, (raw_log_density - log_stretch).sum(-1)
