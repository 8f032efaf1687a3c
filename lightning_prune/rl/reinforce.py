"""REINFORCE: raise the probability of episodes that earned more than the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.rl.base import Agent, Stateful
from lightning_prune.rl.networks import mlp
from lightning_prune.rl.policies import POLICIES
from lightning_prune.rl.settings import chosen
from lightning_prune.rl.transition import Transition

__all__ = ["BASELINES", "Reinforce"]


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
    return returns - (returns.sum() - returns) / (len(returns) - 1)


BASELINES = {"none": no_baseline, "mean": mean_baseline, "leave-one-out": leave_one_out_baseline}


class Reinforce(Agent):
    """Learn from whole episodes, as many as `samples`, each of which counts once.

    An episode may be a single step. Several draws for one observation are one step in as many environments:
    ``act(observation, low)`` with n rows of `low` draws n actions, and a transition with one observation and n actions
    evaluates the network once.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        policy: ``bernoulli``, ``gaussian`` or ``categorical``; with settings as a mapping such as
            ``{"name": "bernoulli", "initial_keep": 0.9}``.
        network: Given (n, observation + context), returns the outputs that describe the policy, such as (n, action)
            log-odds of keeping; None is a multilayer perceptron.
        hidden_sizes: Hidden layers of that perceptron.
        samples: Least number of episodes to learn from.
        baseline: What is subtracted from the return of an episode: the mean of the others (``leave-one-out``), of all
            (``mean``), or nothing (``none``).
        learning_rate: Of Adam.
        **settings: As for `Agent`.

    Raises:
        ValueError: If a setting is unknown, or there are no other episodes to leave one out from.

    Note:
        Williams, "Simple Statistical Gradient-Following Algorithms" (1992); used for pruning by Huang et al., "Learning
        to Prune Filters in Convolutional Neural Networks" (WACV 2018). The leave-one-out baseline is an interpretation:
        it is not known which one that paper has.

    Example:
        >>> agent = Reinforce(observation_size=1, action_size=4, seed=0, samples=8, learning_rate=0.1)
        >>> for _ in range(30):
        ...     actions = agent.act([1.0], low=torch.zeros(8, 4))
        ...     rewards = actions[:, 0] - actions[:, 1:].sum(1)  # keep the first, remove the others
        ...     agent.observe(Transition([1.0], actions, rewards, [1.0], terminated=True))
        ...     losses = agent.update()
        >>> agent.act([1.0], explore=False)
        tensor([1., 0., 0., 0.])
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seed: int,
        *,
        policy: str | Mapping[str, Any] = "bernoulli",
        network: nn.Module | None = None,
        hidden_sizes: Sequence[int] = (64, 64),
        samples: int = 5,
        baseline: str = "leave-one-out",
        learning_rate: float = 1e-3,
        **settings: Any,
    ) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        make_policy, policy_settings = chosen(POLICIES, policy, "policy")
        self.baseline, _ = chosen(BASELINES, baseline, "baseline")
        if samples < 2 and baseline == "leave-one-out":
            raise ValueError(f"The baseline 'leave-one-out' needs at least 2 `samples`; got {samples}.")
        if network is None:
            sizes = (self.input_size, *hidden_sizes, make_policy.outputs(self.low, self.high))
            network = mlp(sizes, self.generator, output_gain=0.01)
        self.policy = make_policy(network, self.low, self.high, **policy_settings).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), learning_rate, fused=True)
        self.memory = _Episodes()
        self.samples = samples

    @override
    def observe(self, transition: Transition) -> None:
        action = self._tensor(transition.action, self.action_size)
        ended = self._tensor(transition.terminated).bool() | self._tensor(transition.truncated).bool()
        if bool(ended.any()) != bool(ended.all()):
            raise ValueError("REINFORCE learns from whole episodes: environments stepped together must end together.")
        reward = self._tensor(transition.reward)
        if not bool(reward.isfinite().all()):
            raise ValueError(f"A transition has a reward that is not finite: {transition.reward}.")
        # Not in rows as with other agents: the observation of a layer may be millions of numbers, shared by all draws.
        step = {
            "observation": self._tensor(transition.observation, self.observation_size),
            "action": action,
            "low": self.low if transition.low is None else self._tensor(transition.low, self.action_size),
            "high": self.high if transition.high is None else self._tensor(transition.high, self.action_size),
            "reward": reward.expand(len(action)),
            "epoch": self._tensor(transition.epoch),
        }
        self.memory.add(step, bool(ended.all()))

    @override
    def update(self) -> dict[str, float]:
        if self.memory.running or self.memory.count < self.samples:
            return {}
        log_probs, returns = [], []
        for episodes in self.memory.take():
            log_probs.append(torch.stack([self._log_prob(step) for step in episodes]).sum(0))
            returns.append(torch.stack([step["reward"] for step in episodes]).sum(0))
        advantages = self.baseline(torch.cat(returns))
        loss = -(advantages * torch.cat(log_probs)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"actor_loss": loss.item(), "mean_return": torch.cat(returns).mean().item()}

    def _log_prob(self, step: dict[str, Tensor]) -> Tensor:
        inputs = self._inputs(step["observation"], step["epoch"])
        return self.policy(inputs, step["low"], step["high"]).log_prob(step["action"])

    def _tensor(self, value: Any, size: int | None = None) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float32).to(self.device)
        return tensor.reshape(-1) if size is None else tensor.reshape(-1, size)

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, explore: bool, epoch: int) -> Tensor:
        distribution = self.policy(self._inputs(observation, epoch), low, high)
        return distribution.sample(self.exploration) if explore else distribution.mode()

    @override
    def _parts(self) -> dict[str, Stateful]:
        return {"policy": self.policy, "optimizer": self.optimizer, "memory": self.memory}


class _Episodes:
    """Keep the steps of episodes, each taken in n environments at once."""

    def __init__(self) -> None:
        self.running: list[dict[str, Tensor]] = []
        self._ended: list[list[dict[str, Tensor]]] = []

    @property
    def count(self) -> int:
        return sum(len(episodes[0]["action"]) for episodes in self._ended)

    def add(self, step: dict[str, Tensor], ended: bool) -> None:
        self.running.append(step)
        if ended:
            self._ended.append(self.running)
            self.running = []

    def take(self) -> list[list[dict[str, Tensor]]]:
        ended, self._ended = self._ended, []
        return ended

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running, "ended": self._ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running, self._ended = state["running"], state["ended"]
