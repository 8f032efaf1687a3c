"""Episodes of pruning decisions: how wide each group is to be, one after the other, within a budget."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.rl.agent import Agent
from lightning_prune.rl.transitions import Transition
from lightning_prune.search.pruning_problem import PruningProblem

__all__ = ["PruningEpisodes", "View", "play"]


@dataclass(frozen=True)
class View:
    """What an agent is given before a step of n episodes.

    Args:
        observation: (n, OBSERVATION_SIZE) what is seen of the next group; each number is from 0 to 1.
        low: (n, 1) least fraction of its channels that may be pruned.
        high: (n, 1) greatest fraction.
    """

    observation: Tensor
    low: Tensor
    high: Tensor


class PruningEpisodes:
    """Several episodes, each at the same step.

    Args:
        problem: What is decided on.
        n: Number of episodes.

    Attributes:
        widths: (n, groups) int64 widths; those of groups that are not decided on yet are 0.
        actions: (n, 1) the last actions as they were executed: the fractions that were pruned.
        view: What is seen, and what is allowed in the next step.
    """

    def __init__(self, problem: PruningProblem, n: int) -> None:
        self.problem = problem
        self.widths = np.zeros((n, len(problem)), dtype=np.int64)
        self.position = 0
        self.actions = torch.zeros(n, 1)
        self._look()

    @property
    def ended(self) -> bool:
        """Whether all groups are decided on."""
        return self.position == len(self.problem)

    def step(self, actions: Tensor) -> None:
        """Decide on the next group; actions out of bounds are clipped.

        Args:
            actions: (n, 1) fraction of the channels that is pruned.
        """
        group = self.position
        size = self.problem.sizes[group]
        fractions_to_keep = (1 - actions.flatten()).tolist()
        for episode, fraction in enumerate(fractions_to_keep):
            narrowest, widest = self._ranges[episode]
            width = self.problem.bounds.nearest(group, fraction * size, narrowest, widest)
            self.widths[episode, group] = width
        kept = torch.from_numpy(self.widths[:, group] / size).float()
        self.actions = 1 - kept[:, None]
        self.position += 1
        self._look()

    def _look(self) -> None:
        """Note what is seen, and what is allowed next."""
        decided = self.widths[:, : self.position]
        observation = self._observation(decided)
        if self.ended:
            no_bounds = torch.zeros_like(self.actions), torch.ones_like(self.actions)
            self.view = View(observation, *no_bounds)
            return
        self._ranges = [self.problem.bounds.after(widths) for widths in decided]
        low = self._pruned_fraction([allowed.widest for allowed in self._ranges])
        high = self._pruned_fraction([allowed.narrowest for allowed in self._ranges])
        self.view = View(observation, low, high)

    def _observation(self, decided: np.ndarray) -> Tensor:
        """Return what is seen of the next group: (n, OBSERVATION_SIZE).

        Args:
            decided: (n, groups so far) widths.
        """
        features = self.problem.features[self.position]
        costs = [self._spent_and_open(widths) for widths in decided]
        columns = [
            features.expand(len(decided), -1),  # (n, 6)
            torch.tensor(costs, dtype=torch.float32),  # (n, 2)
            self.actions,  # (n, 1)
        ]
        return torch.cat(columns, dim=1)

    def _pruned_fraction(self, widths: list[int]) -> Tensor:
        """Return the fraction of the next group that is pruned at each of n widths: (n, 1)."""
        size = int(self.problem.sizes[self.position])
        kept = torch.tensor(widths) / size
        return 1 - kept[:, None]

    def _spent_and_open(self, decided: np.ndarray) -> list[float]:
        """Return the cost spent at least, and what may come on top of it, as fractions of the original.

        Args:
            decided: (groups so far,) widths.
        """
        cost = self.problem.cost
        bounds = self.problem.bounds
        narrowest = np.concatenate([decided, bounds.least[self.position :]])
        widest = np.concatenate([decided, bounds.most[self.position :]])
        spent = cost.fraction(narrowest)
        most = cost.fraction(widest)
        return [spent, most - spent]


def play(
    problem: PruningProblem, agent: Agent, n: int, greedy: bool = False, epoch: int = 0
) -> tuple[np.ndarray, list[Transition]]:
    """Let an agent decide in several episodes at once.

    Args:
        problem: What is decided on.
        agent: The agent.
        n: Number of episodes.
        greedy: Whether the agent takes its best known actions; otherwise it samples them.
        epoch: The epoch of training.

    Returns:
        The (n, groups) widths, and the transitions of all steps, each of n environments and without reward.
    """
    episodes = PruningEpisodes(problem, n)
    transitions = []
    while not episodes.ended:
        before = episodes.view
        actions = agent.act(before.observation, before.low, before.high, greedy=greedy, epoch=epoch)
        episodes.step(actions)
        transition = _transition(before, actions, episodes.view, terminated=episodes.ended, epoch=epoch)
        transitions.append(transition)
    return episodes.widths, transitions


def _transition(before: View, actions: Tensor, after: View, **flags: Any) -> Transition:
    return Transition(
        observation=before.observation,
        action=actions,
        reward=0.0,
        next_observation=after.observation,
        low=before.low,
        high=before.high,
        next_low=after.low,
        next_high=after.high,
        **flags,
    )
