"""Controls: searches without an agent, which any agent has to beat with as many evaluations.

Random search is among the agents, for it decides step by step as they do.
"""

import copy
import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.search.filling import filled, narrowed
from lightning_prune.search.pruning_problem import PruningProblem
from lightning_prune.search.width_search import Tried, WidthSearch

Row = list[int]
"""Channels of each group that are kept."""
Rows = list[Row]
Measured = tuple[Row, float]
"""Widths, and what they have earned."""
Known = list[Measured]

__all__ = ["CONTROLS", "Control", "Evolution", "Greedy", "Halving", "SkipWhole", "Uniform"]

_DEVIATION = 0.15  # of mutations, as a fraction of the channels of a group
_ALONE = 0.5  # probability with which a mutation changes one group, and not two
_SPARE = 2  # steps, for those that one group alone could not make long enough
_ATTEMPTS = 8  # to find what has not been tried
_LEFT_ALONE = 0.3  # probability with which a group of a random set is


class Control(WidthSearch):
    """A search that plans some evaluations ahead, and goes on when it knows what they have earned.

    Args:
        episodes: Greatest number of plans in a round.
        evaluations: Number of plans that can be tried in all.
        seed: Seed of all random numbers.
    """

    remembered: tuple[str, ...] = ()
    """Names of the attributes that a checkpoint holds, of plain values."""

    def __init__(self, episodes: int = 10, evaluations: int = 100, seed: int = 0) -> None:
        super().__init__(episodes)
        self.evaluations = evaluations
        self.generator = torch.Generator().manual_seed(seed)
        self._waiting: Rows = []  # widths that are to be measured
        self._known: Known = []  # those that have been, since the last time it was planned

    @abstractmethod
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        """Return the widths to measure next, at least one, given what the last ones have earned."""

    @override
    def _propose(self, problem: PruningProblem, epoch: int) -> np.ndarray:
        if not self._waiting:
            known, self._known = self._known, []
            self._waiting = self._plan_ahead(problem, known)
        left = self.evaluations - len(self.tried)
        count = min(self.episodes, max(1, left))
        rows = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return np.array(rows, dtype=np.int64)

    @override
    def _learn(self, widths: np.ndarray, rewards: Tensor) -> dict[str, float]:
        self._known += zip(widths.tolist(), rewards.tolist(), strict=True)
        best = self.tried.best()
        return {} if best is None else {"best_return": best[1]}

    @override
    def settle(self, problem: PruningProblem, epoch: int = 0) -> np.ndarray:
        best = self.tried.best()
        widths = filled(problem, problem.sizes) if best is None else best[0]
        return np.array([widths], dtype=np.int64)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.remembered}
        state["generator"] = self.generator.get_state()
        state["waiting"] = self._waiting
        state["known"] = self._known
        state["finished"] = self.finished
        state["tried"] = vars(self.tried)
        return copy.deepcopy(state)

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        for name in self.remembered:
            value = state[name]
            setattr(self, name, value)
        generator = state["generator"]
        self.generator.set_state(generator.cpu())
        self._waiting = state["waiting"]
        self._known = state["known"]
        self.finished = state["finished"]
        self.tried = Tried(**state["tried"])

    def _random(self, count: int) -> np.ndarray:
        """Return (count,) numbers from 0 to 1."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64).numpy()

    def _at_random(self, problem: PruningProblem) -> Row:
        """Return random widths within the budget."""
        fractions = self._random(len(problem))
        return filled(problem, fractions * problem.sizes).tolist()

    def _mutated(self, problem: PruningProblem, widths: Row) -> Row:
        """Return widths near others that have not been tried, unless it takes too long to find some."""
        child = self._mutation(problem, widths)
        for _ in range(_ATTEMPTS):
            if child not in self.tried.widths:
                break
            child = self._mutation(problem, widths)
        return child

    def _mutation(self, problem: PruningProblem, widths: Row) -> Row:
        """Return widths within the budget that are others in one or two groups, and what that makes of the rest."""
        groups = len(problem)
        count = 1 if self._random(1) < _ALONE else 2
        order = torch.randperm(groups, generator=self.generator)
        chosen = order[:count].numpy()
        drawn = torch.randn(count, generator=self.generator, dtype=torch.float64)
        wished = np.array(widths, dtype=np.float64)
        sizes = problem.sizes[chosen]
        moves = _DEVIATION * sizes * drawn.numpy()
        moved = wished[chosen] + moves
        wished[chosen] = np.clip(moved, 1, sizes)
        return filled(problem, wished).tolist()


class Uniform(Control):
    """Give every group the same share of the cut; there is nothing to search for.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> problem = PruningProblem(trace(model, torch.zeros(1, 1)), keep=0.5, metric="params")
        >>> Uniform().explore(problem)
        array([[5, 5]])
    """

    @override
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        self.finished = True
        return [filled(problem, problem.sizes).tolist()]


class Greedy(Control):
    """Narrow one group at a time, the one that costs least reward for what it saves, until the budget is met.

    Every step saves about as much; there are as many as the number of evaluations allows.

    Note:
        As in Yang et al., "NetAdapt" (ECCV 2018), without its short training of every candidate.
    """

    remembered = ("current", "earned", "step")

    def __init__(self, episodes: int = 10, evaluations: int = 100, seed: int = 0) -> None:
        super().__init__(episodes, evaluations, seed)
        self.current: Row = []
        self.earned = math.nan  # of the network as it is now
        self.step = 0

    @override
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        if not self.current:
            self.current = problem.bounds.most.tolist()
            return [self.current]  # what the first steps are compared with
        if math.isnan(self.earned):
            ((_, self.earned),) = known
        elif known:
            self._take(problem, known)
        cost = problem.cost
        now = np.array(self.current)
        if cost.of(now) <= problem.bounds.budget:
            self.finished = True
            return [self.current]
        groups = len(problem)
        rounds = (self.evaluations - 1) // groups
        steps = max(1, rounds - _SPARE)
        self.step = min(self.step + 1, steps)
        budget = problem.bounds.budget
        above = cost.of(problem.bounds.most) - budget
        still = 1 - self.step / steps
        target = budget + still * above
        rows = [narrowed(problem, self.current, group, target) for group in range(groups)]
        return [row for row in rows if row != self.current]

    def _take(self, problem: PruningProblem, known: Known) -> None:
        """Take the step that costs least for what it saves."""
        cost = problem.cost
        before = cost.of(np.array(self.current))

        def price(step: Measured) -> float:
            widths, earned = step
            after = cost.of(np.array(widths))
            saved = before - after
            paid = self.earned - earned
            return paid / saved if saved > 0 else math.inf

        self.current, self.earned = min(known, key=price)

    @override
    def settle(self, problem: PruningProblem, epoch: int = 0) -> np.ndarray:
        if self.tried.best() is None and self.current:
            return filled(problem, np.array(self.current))[None]
        return super().settle(problem, epoch)


class Evolution(Control):
    """Change the best of some that are drawn among the last ones tried, so that the oldest die out, however good.

    Args:
        episodes: As for `Control`.
        evaluations: As for `Control`.
        seed: As for `Control`.
        population: How many of the last ones live; default a fifth of all evaluations, from 4 to 25.
        sample: How many are drawn to choose a parent from.

    Note:
        Real et al., "Regularized Evolution for Image Classifier Architecture Search" (AAAI 2019).
    """

    def __init__(
        self,
        episodes: int = 10,
        evaluations: int = 100,
        seed: int = 0,
        population: int | None = None,
        sample: int = 5,
    ) -> None:
        super().__init__(episodes, evaluations, seed)
        fifth = evaluations // 5
        self.population = population or min(25, max(4, fifth))
        self.sample = min(sample, self.population)

    @override
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        missing = self.population - len(self.tried)
        if missing > 0:
            count = min(missing, self.episodes)
            return [self._at_random(problem) for _ in range(count)]
        return [self._child(problem) for _ in range(self.episodes)]

    def _child(self, problem: PruningProblem) -> Row:
        tried = self.tried
        order = torch.randperm(self.population, generator=self.generator)
        drawn = order[: self.sample]
        first = len(tried) - self.population
        numbers = (first + drawn).tolist()
        parent = max(numbers, key=lambda number: tried.rewards[number])
        return self._mutated(problem, tried.widths[parent])


class Halving(Control):
    """Begin in many places; in each round the better half goes on, with twice as many evaluations around each.

    Note:
        Successive halving (Jamieson and Talwalkar, AISTATS 2016). Interpretation: what an arm is given more of are
        trials near the best that it has found, for a network is measured on all images or not at all.
    """

    remembered = ("arms", "trials")

    def __init__(self, episodes: int = 10, evaluations: int = 100, seed: int = 0) -> None:
        super().__init__(episodes, evaluations, seed)
        self.arms: list[list[Any]] = []  # of each the best widths, and what they have earned
        self.trials = 0  # around each, in this round

    @property
    def first_arms(self) -> int:
        """Number of places to begin in: a power of two, so that the evaluations last until one is left."""
        halvings = 1
        while True:
            arms = 2 ** (halvings + 1)
            rounds = halvings + 2
            if arms * rounds > self.evaluations:
                return 2**halvings
            halvings += 1

    @override
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        if not self.trials:
            self.trials = 1
            return [self._at_random(problem) for _ in range(self.first_arms)]
        if not self.arms:
            self.arms = [[widths, earned] for widths, earned in known]
        else:
            self._credit(known)
        self.arms.sort(key=lambda arm: -arm[1])
        half = len(self.arms) // 2
        if half:
            self.arms = self.arms[:half]
            self.trials *= 2
        rows: Rows = []
        for widths, _ in self.arms:
            rows += [self._mutated(problem, widths) for _ in range(self.trials)]
        return rows

    def _credit(self, known: Known) -> None:
        """Note what was found around each arm."""
        for number, (widths, earned) in enumerate(known):
            arm = self.arms[number // self.trials]
            if earned > arm[1]:
                arm[:] = [widths, earned]


class SkipWhole(Control):
    """Leave some groups alone and give all others the same share: streams, what is within blocks, each one, or a few.

    A stream is a group whose channels several layers produce, as those that blocks add to.
    """

    remembered = ("begun",)

    def __init__(self, episodes: int = 10, evaluations: int = 100, seed: int = 0) -> None:
        super().__init__(episodes, evaluations, seed)
        self.begun = False

    @override
    def _plan_ahead(self, problem: PruningProblem, known: Known) -> Rows:
        groups = len(problem)
        if not self.begun:
            self.begun = True
            sets = _sets_to_skip(problem)
        else:
            sets = [self._random(groups) < _LEFT_ALONE for _ in range(self.episodes)]
        uniform = filled(problem, problem.sizes)
        every = [filled(problem, problem.sizes, whole) for whole in sets]
        rows = np.stack([*every, uniform])
        within = problem.within_budget(rows)
        within[-1] = not within[:-1].any()  # where the others can make up for none of the sets
        kept: Rows = rows[within].tolist()
        return kept


def _sets_to_skip(problem: PruningProblem) -> list[np.ndarray]:
    """Return sets of groups to leave alone: none, the streams, all but the streams, and each one."""
    groups = len(problem)
    none = np.zeros(groups, dtype=bool)
    streams = none.copy()
    shapes = problem.graph.shapes
    for number, group in enumerate(problem.graph.groups.values()):
        tensors = {one.tensor for one in group.out_slices}
        weights = [tensor for tensor in tensors if len(shapes[tensor]) > 1]
        streams[number] = len(weights) > 1
    each = np.eye(groups, dtype=bool)
    sets = [none, *each]
    if streams.any() and not streams.all():
        sets[1:1] = [streams, ~streams]
    return sets


CONTROLS: dict[str, type[Control]] = {
    "uniform": Uniform,
    "greedy": Greedy,
    "evolution": Evolution,
    "halving": Halving,
    "skip-whole": SkipWhole,
}
"""Controls by name; put your own in here."""
