"""Episodes of pruning decisions: how wide each group is to be, one after the other, within a budget."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.rl.agent import Agent
from lightning_prune.rl.transitions import Transition
from lightning_prune.search.pruning_problem import PruningProblem

__all__ = ["PruningEpisodes", "Residual", "View", "play"]


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
        fractions_to_keep = (1 - actions.flatten()).double().cpu().numpy()
        wished = fractions_to_keep * size
        self.widths[:, group] = self.problem.bounds.nearest_of_each(group, wished, *self._ranges)
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
        self._ranges = self.problem.bounds.after_each(decided)
        narrowest, widest = self._ranges
        low = self._pruned_fraction(widest)
        high = self._pruned_fraction(narrowest)
        self.view = View(observation, low, high)

    def _observation(self, decided: np.ndarray) -> Tensor:
        """Return what is seen of the next group: (n, OBSERVATION_SIZE).

        Args:
            decided: (n, groups so far) widths.
        """
        features = self.problem.features[self.position]
        columns = [
            features.expand(len(decided), -1),  # (n, 6)
            self._spent_and_open(decided),  # (n, 2)
            self.actions,  # (n, 1)
        ]
        return torch.cat(columns, dim=1)

    def _pruned_fraction(self, widths: np.ndarray) -> Tensor:
        """Return the fraction of the next group that is pruned at each of n widths: (n, 1)."""
        size = int(self.problem.sizes[self.position])
        kept = torch.from_numpy(widths) / size
        return 1 - kept[:, None]

    def _spent_and_open(self, decided: np.ndarray) -> Tensor:
        """Return the cost spent at least, and what may come on top of it, as fractions of the original: (n, 2).

        Args:
            decided: (n, groups so far) widths.
        """
        bounds = self.problem.bounds
        spent = self._fractions(bounds.completed(decided, bounds.least))
        most = self._fractions(bounds.completed(decided, bounds.most))
        columns = np.stack([spent, most - spent], axis=1)
        return torch.from_numpy(columns).float()

    def _fractions(self, widths: np.ndarray) -> np.ndarray:
        """Return the costs at some (n, groups) widths as fractions of the original: (n,)."""
        original = self.problem.cost.original
        costs = self.problem.cost.of_terms(widths).sum(axis=1)
        return costs / original if original else np.ones(len(widths))


@dataclass(frozen=True)
class Residual:
    """What the actions of an agent mean around an allocation: 0.5 is the allocation itself.

    Args:
        centre: (groups,) fractions that the allocation prunes.
        span: How far the actions 0 and 1 are from it, as a fraction of the channels.
    """

    centre: np.ndarray
    span: float

    def actions(self, group: int, fractions: Tensor) -> Tensor:
        """Return the actions that mean some fractions of a group, as near as there are.

        Args:
            group: Number of the group.
            fractions: (n, 1) fractions of its channels that are pruned.
        """
        distances = fractions - float(self.centre[group])
        actions = 0.5 + distances / (2 * self.span)
        return actions.clamp(0, 1)

    def fractions(self, group: int, actions: Tensor) -> Tensor:
        """Return the fractions of a group that (n, 1) actions mean.

        Args:
            group: Number of the group.
            actions: The actions.
        """
        distances = (actions - 0.5) * (2 * self.span)
        return distances + float(self.centre[group])


def play(
    problem: PruningProblem,
    agent: Agent,
    n: int,
    greedy: bool = False,
    epoch: int = 0,
    residual: Residual | None = None,
) -> tuple[np.ndarray, list[Transition]]:
    """Let an agent decide in several episodes at once.

    Args:
        problem: What is decided on.
        agent: The agent.
        n: Number of episodes.
        greedy: Whether the agent takes its best known actions; otherwise it samples them.
        epoch: The epoch of training.
        residual: What actions mean, if not the fractions that are pruned.

    Returns:
        The (n, groups) widths, and the transitions of all steps, each of n environments and without reward.
    """
    episodes = PruningEpisodes(problem, n)
    transitions = []
    while not episodes.ended:
        group = episodes.position
        before = _as_seen(episodes, residual)
        actions = agent.act(before.observation, before.low, before.high, greedy=greedy, epoch=epoch)
        episodes.step(actions if residual is None else residual.fractions(group, actions))
        after = _as_seen(episodes, residual)
        transition = _transition(before, actions, after, terminated=episodes.ended, epoch=epoch)
        transitions.append(transition)
    return episodes.widths, transitions


def _as_seen(episodes: PruningEpisodes, residual: Residual | None) -> View:
    """Return what the agent is given, with bounds of what its actions mean."""
    view = episodes.view
    if residual is None or episodes.ended:
        return view
    low = residual.actions(episodes.position, view.low)
    high = residual.actions(episodes.position, view.high)
    return View(view.observation, low, high)


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
