"""How wide each group may be, one after the other, for a budget to stay within reach."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.planning.telling import tell_of_budget
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["WidthBounds", "WidthRange"]


class WidthRange(NamedTuple):
    """The widths that a group may have, in channels."""

    narrowest: int
    widest: int


class WidthBounds:
    """Know the widths that are allowed to the next group, once those before it are decided.

    The widest is what allows all later groups their least width, so that the budget is never missed. The narrowest is
    what meets the budget with all later groups at their full width: to prune more would be more than was asked. Costs
    are those of the widths as they are, so that it does not matter which groups share a layer.

    Args:
        graph: The traced model, pruned already or not.
        cost: What the network costs; must not fall where a group gets wider.
        keep: Fraction of the original cost that may be kept.
        round_to: Layers that are pruned keep a multiple of this many channels.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that may be pruned of a group, in (0, 1].

    Raises:
        ValueError: If the budget cannot be reached.

    Note:
        The bounds of He et al., "AMC" (ECCV 2018) and Ganjdanesh et al. (CVPR 2024): later groups count with what they
        keep at least, as in AMC, not as pruned away. An addition: layers that two groups share are counted at the
        widths of both.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> graph = trace(model, torch.zeros(1, 1))
        >>> bounds = WidthBounds(graph, CostModel(graph, "params"), keep=0.5)
        >>> bounds.after([])  # of 40 parameters, 3 + 3 x 8 + 8 are the most behind which 8 fit, and 8 + 8 + 1 fit too
        WidthRange(narrowest=3, widest=8)
        >>> bounds.after([8])  # 8 + 8 x 3 + 3
        WidthRange(narrowest=3, widest=3)
    """

    def __init__(
        self,
        graph: ChannelGraph,
        cost: CostModel,
        keep: float,
        round_to: int = 1,
        min_channels: int = 1,
        cap: float = 1.0,
    ) -> None:
        limits = Limits(graph, _equal_scores(graph), round_to, min_channels, cap)
        limits.check(keep, cost.metric, limits.reachable(cost))
        self.cost = cost
        self.keep = keep
        self.round_to = round_to
        self.limits = limits
        self.budget = keep * cost.original
        self.least = limits.least
        self.most = limits.most
        self.allowed = [_allowed_widths(limits, group) for group in range(len(self.most))]

    def after(self, decided: Sequence[int] | np.ndarray) -> WidthRange:
        """Return the narrowest and the widest that the next group may be.

        Args:
            decided: Widths of the groups before it, each within its own bounds.
        """
        narrowest, widest = self.after_each(np.array([decided], dtype=np.int64))
        return WidthRange(int(narrowest[0]), int(widest[0]))

    def after_each(self, decided: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the narrowest and the widest that the next group may be in each of n episodes: (n,) each.

        Args:
            decided: (n, groups so far) int64 widths of the groups before it, each within its own bounds.
        """
        group = decided.shape[1]
        most = self.completed(decided, self.most)
        least = self.completed(decided, self.least)
        return self._widest(most, group), self._widest(least, group)

    @staticmethod
    def completed(decided: np.ndarray, later: np.ndarray) -> np.ndarray:
        """Return the widths that n episodes would end with: (n, groups).

        Args:
            decided: (n, groups so far) widths.
            later: (groups,) those that all others are to have.
        """
        widths = np.tile(later, (len(decided), 1))
        widths[:, : decided.shape[1]] = decided
        return widths

    def nearest(self, group: int, width: float, narrowest: int, widest: int) -> int:
        """Return the allowed width that is nearest to one that is wished for, the narrower one of two.

        Args:
            group: Number of the group.
            width: The wish.
            narrowest: Least width.
            widest: Greatest width.
        """
        ranges = np.array([narrowest]), np.array([widest])
        return int(self.nearest_of_each(group, np.array([width]), *ranges)[0])

    def nearest_of_each(self, group: int, wished: np.ndarray, narrowest: np.ndarray, widest: np.ndarray) -> np.ndarray:
        """Return what `nearest` would in each of n episodes, all at once.

        Args:
            group: Number of the group.
            wished: (n,) float64 wishes.
            narrowest: (n,) least widths, each of them allowed.
            widest: (n,) greatest widths, each of them allowed.

        Returns:
            (n,) int64 widths.
        """
        allowed = np.array(self.allowed[group])
        within = np.clip(wished, narrowest, widest)
        above = np.searchsorted(allowed, within)  # the least width that is no narrower
        below = np.maximum(above - 1, 0)
        narrower, wider = allowed[below], allowed[above]
        to_narrower = np.abs(narrower - wished)
        to_wider = np.abs(wider - wished)
        is_narrower = (to_narrower <= to_wider) & (narrower >= narrowest)
        return np.where(is_narrower, narrower, wider)

    def report(self, widths: np.ndarray) -> dict[str, Any]:
        """Return what plans tell of their budget.

        Args:
            widths: (groups,) channels that are kept.
        """
        achieved = self.cost.fraction(widths)
        return {
            "metric": self.cost.metric,
            "asked": self.keep,
            "reachable": self.cost.fraction(self.least),
            "rounded": achieved,
            "achieved": achieved,
            "original": self.cost.original,
            "round_to": self.round_to,
        }

    def tell(self, plan: PruningPlan) -> None:
        """Warn if a plan that was chosen leaves much of its budget.

        Args:
            plan: The channels to keep, with what `report` returns as its budget.
        """
        tell_of_budget(plan, self.cost, self.limits)

    def _widest(self, widths: np.ndarray, group: int) -> np.ndarray:
        """Return the widest that a group may be, the least allowed width if none fits: (n,).

        Args:
            widths: (n, groups) those of all other groups.
            group: Number of the group.
        """
        allowed = np.array(self.allowed[group])
        varying = self.cost.terms_of(group)
        cost = self.cost.only(varying)
        costs = self.cost.of_terms(widths)  # (n, terms)
        # The allowed widths ascend, and so do their costs: halve the range of the first that misses the budget.
        last = len(allowed) - 1
        first = np.zeros(len(widths), dtype=np.int64)
        stop = first + len(allowed)
        while True:
            is_open = first < stop
            if not is_open.any():
                break
            middle = (first + stop) // 2
            within = np.minimum(middle, last)
            widths[:, group] = allowed[within]
            costs[:, varying] = cost.of_terms(widths)
            misses = costs.sum(axis=1) > self.budget
            stop = np.where(is_open & misses, middle, stop)
            first = np.where(is_open & ~misses, middle + 1, first)
        before = np.maximum(first - 1, 0)
        return allowed[before]


def _equal_scores(graph: ChannelGraph) -> dict[str, torch.Tensor]:
    """Return scores that tell nothing but which channels are still there: 0 for those, else ``-inf``."""
    scores = {}
    now = graph.snapshot({})
    for name, group in graph.groups.items():
        scores[name] = torch.full((group.size,), -torch.inf)
        scores[name][now.kept(name)] = 0
    return scores


def _allowed_widths(limits: Limits, group: int) -> list[int]:
    """Return the widths that a group may have, ascending."""
    widths = [int(limits.least[group])]
    while widths[-1] < limits.most[group]:
        widths.append(limits.above(widths[-1], group))
    return widths
