"""Filling of a budget: widths in given proportions, as wide as the budget lets them be."""

from collections.abc import Sequence

import numpy as np

from lightning_prune.search.pruning_problem import PruningProblem

__all__ = ["filled", "narrowed"]

_HALVINGS = 24
_TINY = 1e-9


def filled(problem: PruningProblem, proportions: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
    """Return the greatest widths in some proportions that are within the budget: (groups,) int64.

    What is left of the budget goes to the groups that would be next to get wider, so that none of them could be wider.

    Args:
        problem: What is decided on.
        proportions: (groups,) widths relative to each other, within the bounds of each group.
        whole: (groups,) bool, groups that keep all they have; the result is then beyond the budget if there is no way.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> problem = PruningProblem(trace(model, torch.zeros(1, 1)), keep=0.5, metric="params")
        >>> filled(problem, np.array([1, 2]))
        array([4, 7])
    """
    bounds = problem.bounds
    wished = np.maximum(proportions, _TINY)

    def at(factor: float) -> np.ndarray:
        widths = rounded_down(problem, factor * wished)
        return widths if whole is None else np.where(whole, bounds.most, widths)

    low = 0.0
    high = float((bounds.most / wished).max())
    if problem.cost.of(at(high)) <= bounds.budget:
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if problem.cost.of(at(middle)) <= bounds.budget:
            low = middle
        else:
            high = middle
    widths = at(low)
    _top_up(problem, widths, wished)
    return widths


def _top_up(problem: PruningProblem, widths: np.ndarray, wished: np.ndarray) -> None:
    """Widen the groups that are furthest from their proportions, one allowed width at a time, within the budget."""
    bounds = problem.bounds
    fits = widths < bounds.most
    while fits.any():
        above = _next_allowed(problem, widths)
        factors = np.where(fits, above / wished, np.inf)
        group = int(factors.argmin())
        before = widths[group]
        widths[group] = above[group]
        fits[group] = widths[group] < bounds.most[group]
        if problem.cost.of(widths) > bounds.budget:
            widths[group] = before
            fits[group] = False


def _next_allowed(problem: PruningProblem, widths: np.ndarray) -> np.ndarray:
    """Return the next allowed width of each group, or the greatest: (groups,) int64."""
    above = []
    pairs = zip(problem.bounds.allowed, widths, strict=True)
    for allowed, width in pairs:
        number = int(np.searchsorted(allowed, width, side="right"))
        last = len(allowed) - 1
        above.append(allowed[min(number, last)])
    return np.array(above, dtype=np.int64)


def rounded_down(problem: PruningProblem, widths: np.ndarray) -> np.ndarray:
    """Return the greatest allowed widths that are no wider, or the least: (groups,) int64.

    Args:
        problem: What is decided on.
        widths: (groups,) float64.
    """
    rounded = []
    pairs = zip(problem.bounds.allowed, widths, strict=True)
    for allowed, width in pairs:
        above = int(np.searchsorted(allowed, width + _TINY, side="right"))
        number = max(0, above - 1)
        rounded.append(allowed[number])
    return np.array(rounded, dtype=np.int64)


def narrowed(problem: PruningProblem, widths: Sequence[int], group: int, target: float) -> list[int]:
    """Return widths of which one group is narrower, until the network costs no more than a target.

    Args:
        problem: What is decided on.
        widths: (groups,) the widths before.
        group: Number of the group.
        target: The cost; the group gets its least width if it is out of reach.
    """
    row = np.array(widths, dtype=np.int64)
    narrower = [width for width in problem.bounds.allowed[group] if width < row[group]]
    for width in reversed(narrower):
        row[group] = width
        if problem.cost.of(row) <= target:
            break
    return [int(width) for width in row]
