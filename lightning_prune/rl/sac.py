"""Soft actor-critic: off-policy learning of continuous actions."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_prune.rl.base import Agent, Stateful
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.storage import ReplayBuffer
from lightning_prune.rl.transition import Transition

__all__ = ["SAC", "squash"]


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
    half = (high - low) / 2
    density = -0.5 * ((raw - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(raw)^2), in a form that stays exact where tanh is 1 to the last digit
    stretch = 2 * (math.log(2) - raw - F.softplus(-2 * raw)) + half.log()
    return low + half * (1 + raw.tanh()), (density - stretch).sum(-1)


class SAC(Agent):
    """Learn a stochastic policy that earns much and stays random, from a buffer of past steps.

    The buffer holds actions as they were executed, and the bounds of each step: where the critics judge an action of
    the policy, they judge what would be executed of it.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        hidden_sizes: Hidden layers of actor and critics.
        temperature: Weight of the entropy; ``"learned"`` finds the one that keeps the entropy at `-action_size`, in
            units of half the range of actions.
        actor_learning_rate: Of Adam, for the actor.
        critic_learning_rate: Of Adam, for the critics and a learned temperature.
        discount: How much a reward counts if it comes one step later.
        target_rate: Share of the critics that their slow copies take over in each step.
        batch_size: Transitions in a gradient step.
        capacity: Transitions in the buffer.
        random_steps: Actions are drawn uniformly within their bounds for so many transitions, and nothing is learned.
        **settings: As for `Agent`.

    Note:
        Haarnoja et al., "Soft Actor-Critic Algorithms and Applications" (2018). The defaults, but for
        `random_steps`, are those that a reproduction of Ganjdanesh et al. (CVPR 2024) states, where the temperature is
        fixed at 0.1. Clipping to the bounds of a step is passed straight through by the gradient of the actor (an
        interpretation), so that an action out of bounds can find its way back.

    Example:
        >>> agent = SAC(observation_size=1, action_size=1, seed=0, random_steps=64)
        >>> for _ in range(64):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, action.item(), [0.0], terminated=True))
        >>> sorted(agent.update())
        ['actor_loss', 'critic_loss', 'entropy', 'temperature']
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seed: int,
        *,
        hidden_sizes: Sequence[int] = (300, 300),
        temperature: float | str = 0.1,
        actor_learning_rate: float = 1e-4,
        critic_learning_rate: float = 1e-3,
        discount: float = 0.99,
        target_rate: float = 0.005,
        batch_size: int = 64,
        capacity: int = 10_000,
        random_steps: int = 100,
        **settings: Any,
    ) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        self.actor = mlp((self.input_size, *hidden_sizes, 2 * action_size), self.generator, output_gain=0.01)
        sizes = (self.input_size + action_size, *hidden_sizes, 1)
        self.critics = nn.ModuleList(mlp(sizes, self.generator) for _ in range(2))
        self.actor.to(self.device)
        self.critics.to(self.device)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), actor_learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), critic_learning_rate, fused=True)
        wanted = float(((self.high - self.low) / 2).log().sum()) - action_size
        self.temperature = (
            LearnedTemperature(wanted, critic_learning_rate, self.device)
            if temperature == "learned"
            else FixedTemperature(float(temperature))
        )
        self.memory = ReplayBuffer(self.layout, capacity)
        self.discount, self.target_rate = discount, target_rate
        self.batch_size, self.random_steps = batch_size, random_steps

    @override
    def observe(self, transition: Transition) -> None:
        self.memory.add(transition)

    @override
    def update(self) -> dict[str, float]:
        if self.memory.count < self.random_steps or not len(self.memory):
            return {}
        batch = self.memory.sample(self.batch_size, self.generator)
        inputs = self._inputs(batch.observation, batch.epoch)
        next_inputs = self._inputs(batch.next_observation, batch.epoch)

        goal = self._goal(batch, next_inputs)
        values = self._values(self.critics, inputs, batch.action)
        critic_loss = 0.5 * (torch.stack(values) - goal).square().mean(1).sum()
        _descend(self.critic_optimizer, critic_loss)

        action, log_prob = self._draw(inputs, batch.low, batch.high, self.generator)
        value = torch.minimum(*self._values(self.critics, inputs, action))
        actor_loss = (self.temperature.value * log_prob - value).mean()
        _descend(self.actor_optimizer, actor_loss)

        self.temperature.update(log_prob.detach())
        self._move_targets()
        figures = torch.stack([critic_loss.detach(), actor_loss.detach(), -log_prob.detach().mean()]).tolist()
        names = ("critic_loss", "actor_loss", "entropy")
        return {**dict(zip(names, figures, strict=True)), "temperature": float(self.temperature.value)}

    @torch.no_grad()
    def _goal(self, batch: Transition, next_inputs: Tensor) -> Tensor:
        """Return the (n,) values that the critics are to predict."""
        action, log_prob = self._draw(next_inputs, batch.next_low, batch.next_high, self.generator)
        value = torch.minimum(*self._values(self.targets, next_inputs, action)) - self.temperature.value * log_prob
        return batch.reward + self.discount * (1 - batch.terminated) * value

    def _draw(self, inputs: Tensor, low: Tensor, high: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return actions of the policy as they would be executed, and their log-density before clipping."""
        mean, log_std = self._policy(inputs)
        shape = torch.broadcast_shapes(mean.shape, low.shape, high.shape)
        noise = torch.randn(shape, generator=generator).to(self.device)
        action, log_prob = squash(mean + log_std.exp() * noise, mean, log_std, self.low, self.high)
        executed = torch.minimum(torch.maximum(action, low), high)
        return executed.detach() + (action - action.detach()), log_prob

    def _policy(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(inputs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)

    @staticmethod
    def _values(critics: nn.ModuleList, inputs: Tensor, action: Tensor) -> list[Tensor]:
        joined = torch.cat([inputs, action], dim=-1)
        return [critic(joined).squeeze(-1) for critic in critics]

    @torch.no_grad()
    def _move_targets(self) -> None:
        for slow, fast in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            slow.lerp_(fast, self.target_rate)

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, explore: bool, epoch: int) -> Tensor:
        if explore and self.memory.count < self.random_steps:
            return self._uniform(low, high, observation.shape[:-1])
        inputs = self._inputs(observation, epoch)
        if explore:
            return self._draw(inputs, low, high, self.exploration)[0]
        action = self.low + (self.high - self.low) / 2 * (1 + self._policy(inputs)[0].tanh())
        return torch.minimum(torch.maximum(action, low), high)

    @override
    def _parts(self) -> dict[str, Stateful]:
        return {
            "actor": self.actor,
            "critics": self.critics,
            "targets": self.targets,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature": self.temperature,
            "memory": self.memory,
        }


class FixedTemperature:
    """Weigh the entropy by a constant."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, log_prob: Tensor) -> None:
        """Stay."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the value is a setting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing over."""


class LearnedTemperature:
    """Weigh the entropy by what keeps it at a wanted value.

    Args:
        entropy: The entropy wanted, in nats.
        learning_rate: Of Adam.
        device: Where it is kept.
    """

    def __init__(self, entropy: float, learning_rate: float, device: torch.device) -> None:
        self.entropy = entropy
        self.log_value = torch.zeros(1, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_value], learning_rate, fused=True)

    @property
    def value(self) -> Tensor:
        """Return the weight."""
        return self.log_value.detach().exp()

    def update(self, log_prob: Tensor) -> None:
        """Raise the weight if the policy has too little entropy, else lower it.

        Args:
            log_prob: (n,) log-density of actions of the policy.
        """
        _descend(self.optimizer, -self.log_value * (log_prob.mean() + self.entropy))

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"log_value": self.log_value.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        self.log_value.data.copy_(state["log_value"])
        self.optimizer.load_state_dict(state["optimizer"])


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Step along the gradient of the optimizer's own parameters; others the loss runs through get none."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
