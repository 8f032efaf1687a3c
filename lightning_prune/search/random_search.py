"""Random search: what any agent that learns has to beat."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.rl.base import Agent, Stateful
from lightning_prune.rl.transition import Layout, Transition

__all__ = ["RandomSearch"]


class RandomSearch(Agent):
    """Draw every action uniformly within its bounds, and remember the best episode.

    Without exploration it repeats the best episode: it takes the action of that episode's nearest observation, which
    in a deterministic environment is the same sequence of actions.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers.
        **settings: As for `Agent`.

    Example:
        >>> agent = RandomSearch(observation_size=1, action_size=1, seed=0)
        >>> for _ in range(200):
        ...     action = agent.act([0.0])
        ...     agent.observe(Transition([0.0], action, -abs(action.item() - 0.3), [0.0], terminated=True))
        >>> agent.update()["best_return"] > -0.02, abs(agent.act([0.0], explore=False).item() - 0.3) < 0.02
        (True, True)
    """

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(observation_size, action_size, seed, **settings)
        self.episodes = _Episodes(self.layout)

    @override
    def observe(self, transition: Transition) -> None:
        self.episodes.add(transition)

    @override
    def update(self) -> dict[str, float]:
        return {"best_return": self.episodes.best_return} if self.episodes.best is not None else {}

    @override
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, explore: bool, epoch: int) -> Tensor:
        best = self.episodes.best
        if explore or best is None:
            return self._uniform(low, high, observation.shape[:-1])
        distances = torch.cdist(observation.reshape(-1, self.observation_size), best.observation)
        action = best.action[distances.argmin(1)].reshape(*observation.shape[:-1], self.action_size)
        return torch.minimum(torch.maximum(action, low), high)

    @override
    def _parts(self) -> dict[str, Stateful]:
        return {"episodes": self.episodes}


class _Episodes:
    """Follow the episode of each environment, and keep the one with the highest return."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.best: Transition | None = None  # its steps
        self.best_return = float("-inf")
        self._best_rows = torch.empty(0, layout.width)
        self._running: list[list[Tensor]] = []  # rows of the episode in each environment

    def add(self, transition: Transition) -> None:
        rows = self.layout.pack(transition)
        self._running += [[] for _ in range(len(rows) - len(self._running))]
        for running, row in zip(self._running, rows, strict=False):
            running.append(row)
            step = self.layout.unpack(row)
            if step.terminated or step.truncated:
                self._offer(torch.stack(running))
                running.clear()

    def _offer(self, rows: Tensor) -> None:
        episode = self.layout.unpack(rows)
        if float(episode.reward.sum()) > self.best_return:
            self.best, self.best_return, self._best_rows = episode, float(episode.reward.sum()), rows

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best_rows, "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_return, self._best_rows = None, float("-inf"), state["best"]
        self._running = [[row.to(self.layout.low.device) for row in rows] for rows in state["running"]]
        if len(state["best"]):
            self._offer(state["best"].to(self.layout.low.device))
