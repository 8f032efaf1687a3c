"""Random search: what any agent that learns has to beat."""

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.rl.agent import Agent
from lightning_prune.rl.checkpointed import Stateful
from lightning_prune.rl.sampling import clip
from lightning_prune.rl.transitions import Layout, Transition

__all__ = ["RandomSearch"]


class RandomSearch(Agent):
    """Draw every action uniformly within its bounds, and remember the best episode.

    Asked to be greedy it repeats the best episode: it takes the action of that episode's nearest observation, which
    in a deterministic environment is the same sequence of actions.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        **settings: As for `AgentSettings`.

    Example:
        >>> agent = RandomSearch(observation_size=1, action_size=1, seed=0)
        >>> for _ in range(200):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, -abs(action.item() - 0.3), [0.0], terminated=True))
        >>> agent.update()["best_return"] > -0.02, abs(agent.act([0.0], greedy=True).item() - 0.3) < 0.02
        (True, True)
    """

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        self.best_episode = BestEpisode(self.layout)

    @override
    def observe(self, transition: Transition) -> None:
        self.best_episode.add(transition)

    @override
    def update(self) -> dict[str, float]:
        if self.best_episode.steps is None:
            return {}
        return {"best_return": self.best_episode.best_return}

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        best = self.best_episode.steps
        if not greedy or best is None:
            return self._uniform(observation, low, high)
        observations = observation.reshape(-1, self.observation_size)
        distances = torch.cdist(observations, best.observation)  # (observations, steps)
        nearest = distances.argmin(1)
        action = best.action[nearest].reshape(*observation.shape[:-1], self.action_size)
        return clip(action, low, high)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {"episodes": self.best_episode}  # the key is that of saved checkpoints


class BestEpisode:
    """Follow the episode of each environment, and keep the one with the highest return.

    Args:
        layout: How a transition becomes a row.

    Attributes:
        steps: The transitions of the best episode; None before one has ended.
        best_return: The sum of its rewards.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._running: list[list[Tensor]] = []  # rows of the episode in each environment
        self._forget_best()

    def add(self, transition: Transition) -> None:
        """Take note of a step.

        Args:
            transition: The step, in one environment or in several.
        """
        rows = self.layout.pack(transition)
        while len(self._running) < len(rows):
            self._running.append([])
        steps = self.layout.unpack(rows)
        ended = (steps.terminated + steps.truncated).tolist()  # those of all environments at once
        for row, running, has_ended in zip(rows, self._running, ended, strict=False):
            running.append(row)
            if has_ended:
                self._offer(torch.stack(running))
                running.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"best": self._rows, "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        device = self.layout.low.device
        self._running = [[row.to(device) for row in rows] for rows in state["running"]]
        self._forget_best()
        if len(state["best"]):
            self._offer(state["best"].to(device))

    def _forget_best(self) -> None:
        self.steps: Transition | None = None
        self.best_return = -math.inf
        self._rows = torch.empty(0, self.layout.width)  # of the best episode

    def _offer(self, rows: Tensor) -> None:
        """Keep the (steps, width) rows of an episode if it is the best so far."""
        episode = self.layout.unpack(rows)
        episode_return = float(episode.reward.sum())
        if episode_return > self.best_return:
            self.steps = episode
            self.best_return = episode_return
            self._rows = rows
