"""Widths within a budget: those of the best channels, wider ones, exchanges between groups, one group rounded finer."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from lightning_prune.planning.best_first import BestFirst
from lightning_prune.planning.budget import NEARLY_ALL
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits

__all__ = ["Widened", "WithinBudget"]

_EXCHANGES = 16  # after which what is still left of a budget is not found by exchanging
_LEAST_SHARE = 0.5  # of its channels, that a group keeps which gives some for a step of another


@dataclass(frozen=True)
class Widened:
    """Widths that use more of a budget than others.

    Attributes:
        widths: (groups,) channels that are kept.
        group: Number of the group that is wider.
        round_to: The multiple that its layers keep.
        cost: What the network costs.
        gain: By how much the scores of the channels that are kept add up to more.
    """

    widths: np.ndarray
    group: int
    round_to: int
    cost: float
    gain: float


class WithinBudget:
    """Find widths within a budget.

    Args:
        ranking: All channels, best first.
        limits: The widths that are allowed.
        cost: What the network costs.
        affordable: What it may cost, no less than at the least widths.
    """

    def __init__(
        self,
        ranking: BestFirst,
        limits: Limits,
        cost: CostModel,
        affordable: float,
    ) -> None:
        self.ranking = ranking
        self.limits = limits
        self.cost = cost
        self.affordable = affordable
        self.enough = NEARLY_ALL * affordable

    def is_used(self, widths: np.ndarray) -> bool:
        """Tell whether hardly anything is left of the budget, or there is nothing to spend it on."""
        if self.cost.of(widths) >= self.enough:
            return True
        return not self._open_groups(widths)

    def best(self) -> np.ndarray:
        """Return the widths, rounded, of the greatest number of best channels that can be afforded: (groups,)."""

        def cost_of_best(number: int) -> float:
            return self.cost.of(self._of_best(number))

        numbers = range(1, len(self.ranking) + 1)
        most = bisect_right(numbers, self.affordable, key=cost_of_best)  # 0 if only the least widths can be afforded
        return self._of_best(most)

    def widened(self, widths: np.ndarray) -> np.ndarray:
        """Widen groups, one rounding step at a time, while the budget allows; best next channels first.

        Args:
            widths: (groups,) channels that are kept.
        """
        turns = [self._turn(group, widths) for group in self._open_groups(widths)]
        heapify(turns)
        while turns:
            _, group = heappop(turns)
            wider = self._a_step_wider(widths, group)
            if self.cost.of(wider) > self.affordable:
                continue
            widths = wider
            if widths[group] < self.limits.most[group]:
                turn = self._turn(group, widths)
                heappush(turns, turn)
        return widths

    def nearer(self, widths: np.ndarray) -> tuple[np.ndarray, Widened | None]:
        """Use more of a budget that much is left of, and say what group had to be rounded finer for it, if one had.

        Args:
            widths: (groups,) channels that are kept, of which no group can be a step wider.
        """
        widths = self.exchanged(widths)
        if self.is_used(widths):
            return widths, None
        best = self._nearest(widths)
        if best is None:
            return widths, None
        if best.round_to == self.limits.round_to:
            return self.widened(best.widths), None
        return best.widths, best

    def exchanged(self, widths: np.ndarray) -> np.ndarray:
        """Widen groups at the expense of others while much of the budget is left and better channels are kept.

        Args:
            widths: (groups,) channels that are kept, of which no group can be a step wider.

        Returns:
            (groups,) channels that are kept; they cost no less, and their scores add up to no less.
        """
        for _ in range(_EXCHANGES):
            if self.is_used(widths):
                break
            exchanges = self._wider(widths, self.limits.round_to)
            best = self._best_of(one for one in exchanges if one.gain > 0)
            if best is None:
                break
            widths = self.widened(best.widths)
        return widths

    def _nearest(self, widths: np.ndarray) -> Widened | None:
        """Widen a group that rounding is too coarse for, at the coarsest multiple that uses enough of the budget.

        Another group gives better channels for it only where nothing else is enough.

        Args:
            widths: (groups,) channels that are kept, of which no group can be a step wider.

        Returns:
            The widths; if no multiple does, those that use most of the budget, and None if there are none.
        """
        coarse = self.limits.round_to
        best: Widened | None = None
        found: list[Widened] = []
        for multiple in range(coarse, 0, -1):
            if coarse % multiple:
                continue
            found += self._wider(widths, multiple)
            best = self._best_of(one for one in found if one.gain > 0)
            if best is not None and best.cost >= self.enough:
                return best
        worse = self._best_of(found)
        if worse is not None and worse.cost >= self.enough:
            return worse
        return best

    def _best_of(self, several: Iterable[Widened]) -> Widened | None:
        """Return what keeps the best channels of what uses enough of the budget, else what uses most of it."""
        best = None
        for one in several:
            if best is None or self._order(one) > self._order(best):
                best = one
        return best

    def _order(self, one: Widened) -> tuple[bool, float]:
        is_enough = one.cost >= self.enough
        return is_enough, one.gain if is_enough else one.cost

    def _of_best(self, number: int) -> np.ndarray:
        widths = self.ranking.widths(number)
        return self.limits.rounded(widths)

    def _open_groups(self, widths: np.ndarray) -> list[int]:
        """Return the numbers of the groups that may be wider."""
        is_open = widths < self.limits.most
        return np.flatnonzero(is_open).tolist()

    def _turn(self, group: int, widths: np.ndarray) -> tuple[float, int]:
        next_score = self.ranking.next_score(group, widths[group])
        return -next_score, group

    def _a_step_wider(self, widths: np.ndarray, group: int) -> np.ndarray:
        wider = widths.copy()
        wider[group] = self.limits.above(widths[group], group)
        return wider

    def _wider(self, widths: np.ndarray, round_to: int) -> Iterator[Widened]:
        """Yield affordable widths that cost more: a group is wider, by a step at most, and perhaps another narrower.

        Args:
            widths: (groups,) channels that are kept, of which no group can be a step wider.
            round_to: The multiple that layers of the wider group keep.
        """
        cost_now = self.cost.of(widths)
        for group in self._open_groups(widths):
            for wider in self._at_multiples(widths, group, round_to):
                for given, cost in self._given_by_others(wider, group):
                    if cost_now < cost <= self.affordable:
                        gain = self._gain(widths, given)
                        yield Widened(given, group, round_to, cost, gain)

    def _at_multiples(self, widths: np.ndarray, group: int, round_to: int) -> Iterator[np.ndarray]:
        """Yield widths at which a group is wider, up to a step.

        Args:
            widths: (groups,) channels that are kept.
            group: Number of the group.
            round_to: The multiple that its layers keep.
        """
        step = self.limits.step_of(group, round_to)
        last = self.limits.above(widths[group], group)
        if round_to == self.limits.round_to:
            several = [last]
        else:
            first = widths[group] // step * step + step
            several = list(range(first, last, step))
        for width in several:
            wider = widths.copy()
            wider[group] = width
            yield wider

    def _given_by_others(self, wider: np.ndarray, group: int) -> Iterator[tuple[np.ndarray, float]]:
        """Yield some widths as they are, and with each of the other groups as little narrower as can be afforded.

        Args:
            wider: (groups,) channels that are kept.
            group: Number of the group that is wider.

        Returns:
            The (groups,) channels that are kept, and what they cost.
        """
        cost = self.cost.of(wider)
        yield wider, cost
        if cost <= self.affordable:
            return
        for other, width in enumerate(wider.tolist()):
            narrower = self.limits.below(width, other)
            is_fair = narrower >= _LEAST_SHARE * width
            fair = narrower[is_fair]
            if other == group or not len(fair):
                continue
            rows = np.tile(wider, (len(fair), 1))
            rows[:, other] = fair
            costs = self.cost.of_terms(rows).sum(axis=1)
            affordable = np.flatnonzero(costs <= self.affordable)
            if len(affordable):
                widest = affordable[-1]
                yield rows[widest], float(costs[widest])

    def _gain(self, widths: np.ndarray, others: np.ndarray) -> float:
        """Return by how much the scores of the channels that are kept at other widths add up to more."""
        gain = 0.0
        changed = widths != others
        for group in np.flatnonzero(changed).tolist():
            before = self.ranking.worth(group, widths[group])
            after = self.ranking.worth(group, others[group])
            gain += after - before
        return gain
