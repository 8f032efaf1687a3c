"""The interface of everything that looks for widths: agents that learn, and the controls to compare them with."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.search.pruning_problem import PruningProblem

__all__ = ["Census", "Tried", "WidthSearch"]


@dataclass(frozen=True)
class Census:
    """What a search has tried.

    Attributes:
        tried: Number of plans.
        distinct: How many of them are different.
        within_budget: How many are within the budget.
        best: The greatest reward within the budget; ``-inf`` if there is none.
        constant: Whether the actions of the agent do not depend on what it sees; None for what sees nothing.
    """

    tried: int
    distinct: int
    within_budget: int
    best: float
    constant: bool | None = None

    def __str__(self) -> str:
        line = f"{self.tried} plans tried, {self.distinct} distinct, {self.within_budget} within the budget"
        if self.constant:
            line += "; the agent is constant: what it does, does not depend on what it sees"
        return line


@dataclass
class Tried:
    """The plans that a search has tried.

    Attributes:
        widths: Channels of each group that are kept, of each plan.
        rewards: What each has earned.
        within: Whether each is within the budget.
    """

    widths: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    within: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of plans."""
        return len(self.widths)

    def add(self, widths: np.ndarray, rewards: Tensor, within: np.ndarray) -> None:
        """Add plans.

        Args:
            widths: (n, groups) channels that are kept.
            rewards: (n,) what they have earned.
            within: (n,) whether they are within the budget.
        """
        self.widths += widths.tolist()
        self.rewards += rewards.tolist()
        self.within += within.tolist()

    def best(self) -> tuple[list[int], float] | None:
        """Return the widths within the budget that have earned most, and how much; None if there are none."""
        numbers = [number for number, within in enumerate(self.within) if within]
        if not numbers:
            return None
        best = max(numbers, key=lambda number: self.rewards[number])
        return self.widths[best], self.rewards[best]

    def census(self, constant: bool | None = None) -> Census:
        """Return the numbers of plans.

        Args:
            constant: As `Census` has it.
        """
        distinct = set(map(tuple, self.widths))
        best = self.best()
        return Census(
            tried=len(self),
            distinct=len(distinct),
            within_budget=sum(self.within),
            best=-math.inf if best is None else best[1],
            constant=constant,
        )


class WidthSearch(ABC):
    """Look for the widths that earn most: `explore`, measure what it returns, let it `learn`, and again.

    Args:
        episodes: Greatest number of plans in a round.

    Attributes:
        tried: The plans that were tried, those beyond the budget among them.
        finished: Whether there is nothing more to try; what `explore` returns has then been tried before.
    """

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes
        self.tried = Tried()
        self.finished = False
        self._best_before: float | None = None  # this round
        self._asked = np.zeros((0, 0), dtype=np.int64)
        self._within = np.zeros(0, dtype=bool)

    def explore(self, problem: PruningProblem, epoch: int = 0) -> np.ndarray:
        """Return widths to be measured: (n, groups), where n is at least 1 and at most ``episodes``.

        Those of a search that comes to the budget step by step may be beyond it; they cannot be what it settles on.

        Args:
            problem: What is decided on.
            epoch: The epoch of training.
        """
        self._asked = self._propose(problem, epoch)
        self._within = problem.within_budget(self._asked)
        return self._asked

    def learn(self, rewards: Tensor) -> dict[str, float]:
        """Learn from what `explore` has returned.

        Args:
            rewards: (n,) what the widths have earned.

        Returns:
            Losses and other figures of the last updates, by name.
        """
        rewards = rewards.float().cpu()
        best = self.tried.best()
        self._best_before = None if best is None else best[1]
        self.tried.add(self._asked, rewards, self._within)
        return self._learn(self._asked, rewards)

    @abstractmethod
    def settle(self, problem: PruningProblem, epoch: int = 0) -> np.ndarray:
        """Return the (1, groups) widths within the budget that are taken to be best.

        Args:
            problem: What is decided on.
            epoch: The epoch of training.
        """

    def census(self) -> Census:
        """Return the numbers of what was tried."""
        return self.tried.census()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on to the same bits."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` of a search with the same settings returned.
        """

    @abstractmethod
    def _propose(self, problem: PruningProblem, epoch: int) -> np.ndarray:
        """Return the widths to be measured next."""

    @abstractmethod
    def _learn(self, widths: np.ndarray, rewards: Tensor) -> dict[str, float]:
        """Learn from what widths have earned: (n, groups) and (n,)."""
