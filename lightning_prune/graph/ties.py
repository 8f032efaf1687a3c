"""Ties as pairs of labels, and the channels that they form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_prune.graph.records import FIXED, Note, Tie

__all__ = ["TiedPairs", "components", "is_among", "notes_on_half_fixed"]


@dataclass(frozen=True)
class TiedPairs:
    """All pairs of positions that some ties tie, one after the other.

    Attributes:
        first: (pairs,) labels on one side.
        second: (pairs,) labels on the other.
        ends: (ties,) number of pairs of each tie and of all before it.
    """

    first: np.ndarray
    second: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, ties: Sequence[Tie]) -> "TiedPairs":
        """Return the pairs of some ties, each of equal sides."""
        if not ties:
            nothing = np.zeros(0, dtype=np.int64)
            return cls(nothing, nothing, nothing)
        first = [tie.first.numpy().reshape(-1) for tie in ties]
        second = [tie.second.numpy().reshape(-1) for tie in ties]
        ends = np.cumsum([len(labels) for labels in first])
        return cls(np.concatenate(first), np.concatenate(second), ends)

    def tie_of(self, pairs: np.ndarray) -> np.ndarray:
        """Return the number of the tie that each of some pairs, given by number, belongs to."""
        return np.searchsorted(self.ends, pairs, side="right")

    def codes(self, count: int) -> np.ndarray:
        """Return each pair as one number: the first label times the number of labels, plus the second."""
        return self.first * count + self.second

    def sorted_codes(self, count: int) -> np.ndarray:
        """Return the codes of all pairs of different labels, ascending."""
        differ = self.first != self.second
        # With repetitions, which take longer to find than to search through.
        return np.sort(self.codes(count)[differ])


def components(count: int, pairs: TiedPairs) -> np.ndarray:
    """Return the component of each label: those that are tied, directly or through others, are in the same.

    Args:
        count: Number of labels.
        pairs: The pairs; `FIXED` ties nothing together.

    Returns:
        (labels,) the smallest label of the component.
    """
    root = np.arange(count)
    neither_fixed = (pairs.first != FIXED) & (pairs.second != FIXED)
    first, second = pairs.first[neither_fixed], pairs.second[neither_fixed]
    while True:
        root_of_first, root_of_second = root[first], root[second]
        apart = root_of_first != root_of_second
        if not apart.any():
            return root
        first, second = first[apart], second[apart]
        root_of_first, root_of_second = root_of_first[apart], root_of_second[apart]
        greater = np.maximum(root_of_first, root_of_second)
        smaller = np.minimum(root_of_first, root_of_second)
        np.minimum.at(root, greater, smaller)
        root = _shortened(root)


def _shortened(root: np.ndarray) -> np.ndarray:
    """Let every label point at the end of its way instead of at the next label."""
    while True:
        further = root[root]
        if (further == root).all():
            return root
        root = further


def notes_on_half_fixed(ties: Sequence[Tie], pairs: TiedPairs) -> list[Note]:
    """Return what makes channels unprunable that are tied to positions which cannot be pruned.

    Args:
        ties: The ties.
        pairs: Their pairs.
    """
    half_fixed = np.flatnonzero((pairs.first == FIXED) != (pairs.second == FIXED))
    notes = []
    for number in np.unique(pairs.tie_of(half_fixed)):
        tie = ties[number]
        first_fixed, second_fixed = tie.first == FIXED, tie.second == FIXED
        met_by_first = tie.second[first_fixed & ~second_fixed]
        met_by_second = tie.first[second_fixed & ~first_fixed]
        notes.append(Note(torch.cat([met_by_second, met_by_first]), tie.module, tie.why))
    return notes


def is_among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Tell which values are among others, which ascend."""
    place = np.searchsorted(ascending, values)
    found = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found
