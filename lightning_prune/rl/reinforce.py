"""REINFORCE: raise the probability of episodes that earned more than the others.

With n episodes, each of which earned a return and had the probability p of all its actions, an update descends
``-mean(advantage * log p)``, where the advantage is the return less a baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.rl.agent import Agent, AgentSettings
from lightning_prune.rl.checkpointed import Stateful
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.policies import POLICIES
from lightning_prune.rl.selection import select
from lightning_prune.rl.transitions import Transition

__all__ = ["BASELINES", "Reinforce", "ReinforceSettings"]


def no_baseline(returns: Tensor) -> Tensor:
    """Return the returns as they are."""
    return returns


def mean_baseline(returns: Tensor) -> Tensor:
    """Subtract the mean; the gradient shrinks by a factor of 1 - 1 / n.

    Args:
        returns: (n,) what each episode earned.

    Example:
        >>> mean_baseline(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-2., -1.,  3.])
    """
    return returns - returns.mean()


def leave_one_out_baseline(returns: Tensor) -> Tensor:
    """Subtract from each the mean of the others, which keeps the gradient unbiased.

    Args:
        returns: (n,) what each episode earned.

    Example:
        >>> leave_one_out_baseline(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-3.0000, -1.5000,  4.5000])
    """
    sums_of_others = returns.sum() - returns
    return returns - sums_of_others / (len(returns) - 1)


BASELINES = {"none": no_baseline, "mean": mean_baseline, "leave-one-out": leave_one_out_baseline}


@dataclass(kw_only=True)
class ReinforceSettings(AgentSettings):
    """Settings of REINFORCE."""

    policy: str | Mapping[str, Any] = "bernoulli"
    """``bernoulli``, ``gaussian`` or ``categorical``; with settings as a mapping such as
    ``{"name": "bernoulli", "initial_probability": 0.9}``."""
    network: nn.Module | None = None
    """Given (n, observation + context), returns the outputs that describe the policy, such as (n, action) log-odds;
    None is a multilayer perceptron."""
    hidden_sizes: Sequence[int] = (64, 64)
    """Hidden layers of that perceptron."""
    n_episodes: int = 5
    """Least number of episodes to learn from."""
    baseline: str = "leave-one-out"
    """What is subtracted from the return of an episode: the mean of the others (``leave-one-out``), of all (``mean``),
    or nothing (``none``)."""
    learning_rate: float = 1e-3
    """Learning rate of Adam."""


class Reinforce(Agent):
    """Learn from complete episodes, as many as `n_episodes`, each of which counts once.

    An episode may be a single step. Several actions for one observation are one step in as many environments:
    ``act(observation, low)`` with n rows of `low` samples n actions, and a transition with one observation and n
    actions evaluates the network once.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        **settings: As for `ReinforceSettings`.

    Raises:
        ValueError: If a setting is unknown, or there are no other episodes to take the mean of as a baseline.

    Note:
        Williams, "Simple Statistical Gradient-Following Algorithms" (1992); used for pruning by Huang et al., "Learning
        to Prune Filters in Convolutional Neural Networks" (WACV 2018). The leave-one-out baseline is an interpretation:
        it is not known which one that paper has.

    Example:
        >>> agent = Reinforce(observation_size=1, action_size=4, seed=0, n_episodes=8, learning_rate=0.1)
        >>> for _ in range(30):
        ...     actions = agent.act([1.0], low=torch.zeros(8, 4))
        ...     rewards = actions[:, 0] - actions[:, 1:].sum(1)  # the first entry is to be 1, the others 0
        ...     agent.observe(Transition([1.0], actions, rewards, [1.0], terminated=True))
        ...     losses = agent.update()
        >>> agent.act([1.0], greedy=True)
        tensor([1., 0., 0., 0.])
    """

    settings_type = ReinforceSettings
    settings: ReinforceSettings

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        n_episodes = self.settings.n_episodes
        self.baseline, _ = select(BASELINES, self.settings.baseline, "baseline")
        if self.baseline is leave_one_out_baseline and n_episodes < 2:
            raise ValueError(f"The baseline 'leave-one-out' needs at least 2 `n_episodes`; got {n_episodes}.")

        policy_class, policy_settings = select(POLICIES, self.settings.policy, "policy")
        network = self.settings.network
        if network is None:
            outputs = policy_class.outputs(self.low, self.high)
            sizes = (self.input_size, *self.settings.hidden_sizes, outputs)
            network = mlp(sizes, self.generator, output_gain=0.01)
        self.policy = policy_class(network, self.low, self.high, **policy_settings).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.settings.learning_rate, fused=True)
        self.episode_buffer = EpisodeBuffer()

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        distribution = self.policy(self._inputs(observation, epoch), low, high)
        return distribution.mode() if greedy else distribution.sample(self.exploration)

    @override
    def observe(self, transition: Transition) -> None:
        terminated = self._tensor(transition.terminated).bool().reshape(-1)
        truncated = self._tensor(transition.truncated).bool().reshape(-1)
        ended = terminated | truncated
        if bool(ended.any()) != bool(ended.all()):
            raise ValueError(
                "REINFORCE learns from complete episodes: environments stepped together must end together."
            )
        self.episode_buffer.add(self._step_of(transition), bool(ended.all()))

    @override
    def update(self) -> dict[str, float]:
        if self.episode_buffer.running or self.episode_buffer.count < self.settings.n_episodes:
            return {}
        log_probs_of_batches = []
        returns_of_batches = []
        for steps in self.episode_buffer.take():  # of as many episodes as there were environments
            log_probs_of_steps = [self._log_prob(step) for step in steps]
            log_probs_of_batches.append(torch.stack(log_probs_of_steps).sum(0))
            returns_of_batches.append(torch.stack([step.reward for step in steps]).sum(0))
        returns = torch.cat(returns_of_batches)  # (episodes,)
        advantages = self.baseline(returns)
        log_probs = torch.cat(log_probs_of_batches)
        loss = -(advantages * log_probs).mean()

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"actor_loss": loss.item(), "mean_return": returns.mean().item()}

    def _log_prob(self, step: "Step") -> Tensor:
        """Return the (n,) log-probabilities of the actions of a step, under the policy as it is now."""
        inputs = self._inputs(step.observation, step.epoch)
        return self.policy(inputs, step.low, step.high).log_prob(step.action)

    def _step_of(self, transition: Transition) -> "Step":
        action = self._tensor(transition.action).reshape(-1, self.action_size)
        reward = self._tensor(transition.reward).reshape(-1)
        if not bool(reward.isfinite().all()):
            raise ValueError(f"A transition has a reward that is not finite: {transition.reward}.")
        return Step(
            observation=self._tensor(transition.observation).reshape(-1, self.observation_size),
            action=action,
            low=self._bounds_or(self.low, transition.low),
            high=self._bounds_or(self.high, transition.high),
            reward=reward.expand(len(action)),
            epoch=self._tensor(transition.epoch).reshape(-1),
        )

    def _bounds_or(self, default: Tensor, bounds: Any) -> Tensor:
        if bounds is None:
            return default
        return self._tensor(bounds).reshape(-1, self.action_size)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {  # the keys are those of saved checkpoints
            "policy": self.policy,
            "optimizer": self.optimizer,
            "memory": self.episode_buffer,
        }


@dataclass
class Step:
    """One step in each of n environments.

    Not in rows as other agents have it: an observation may be millions of numbers that all environments share.

    Args:
        observation: (n, observation), or (1, observation) if it is the same for all.
        action: (n, action) what was executed.
        low: (n, action), (1, action) or (action,) least action allowed.
        high: (n, action), (1, action) or (action,) greatest action allowed.
        reward: (n,) what was earned.
        epoch: (n,) or (1,) the epoch that the environment was in.
    """

    observation: Tensor
    action: Tensor
    low: Tensor
    high: Tensor
    reward: Tensor
    epoch: Tensor


class EpisodeBuffer:
    """Keep the steps of episodes, each taken in n environments at once.

    Attributes:
        running: The steps of the episodes that have not ended yet.
    """

    def __init__(self) -> None:
        self.running: list[Step] = []
        self._ended: list[list[Step]] = []

    @property
    def count(self) -> int:
        """Number of episodes that have ended."""
        return sum(len(steps[0].action) for steps in self._ended)

    def add(self, step: Step, ended: bool) -> None:
        """Store a step.

        Args:
            step: The step.
            ended: Whether the episodes ended with it.
        """
        self.running.append(step)
        if ended:
            self._ended.append(self.running)
            self.running = []

    def take(self) -> list[list[Step]]:
        """Return the steps of all episodes that have ended, and forget them."""
        ended, self._ended = self._ended, []
        return ended

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on, as plain values."""
        ended = [[vars(step) for step in steps] for steps in self._ended]
        return {"running": [vars(step) for step in self.running], "ended": ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        self.running = [Step(**fields) for fields in state["running"]]
        self._ended = [[Step(**fields) for fields in steps] for steps in state["ended"]]
