"""Ties as pairs of labels, and the channels that they form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray

from lightning_prune.graph.records import FIXED, Labels, Note, Record, Tie

__all__ = ["TiedPairs", "components", "is_among", "notes_on_half_fixed", "of_attention", "with_same_widths"]


@dataclass(frozen=True)
class TiedPairs:
    """All pairs of positions that some ties tie, one after the other.

    Attributes:
        first: (pairs,) labels on one side.
        second: (pairs,) labels on the other.
        ends: (ties,) number of pairs of each tie and of all before it.
    """

    first: ndarray
    second: ndarray
    ends: ndarray

    @classmethod
    def of(cls, ties: Sequence[Tie]) -> "TiedPairs":
        """Return the pairs of some ties, each of equal sides."""
        if not ties:
            nothing = np.zeros(0, dtype=np.int64)
            return cls(nothing, nothing, nothing)
        first = [_flat(tie.first) for tie in ties]
        second = [_flat(tie.second) for tie in ties]
        lengths = [len(labels) for labels in first]
        return cls(np.concatenate(first), np.concatenate(second), np.cumsum(lengths))

    def tie_of(self, pairs: ndarray) -> ndarray:
        """Return the number of the tie that each of some pairs, given by number, belongs to."""
        return np.searchsorted(self.ends, pairs, side="right")

    def codes(self, count: int) -> ndarray:
        """Return each pair as one number: the first label times the number of labels, plus the second."""
        return self.first * count + self.second

    def sorted_codes(self, count: int) -> ndarray:
        """Return the codes of all pairs of different labels, ascending."""
        differ = self.first != self.second
        # With repetitions, which take longer to find than to search through.
        return np.sort(self.codes(count)[differ])


def _flat(labels: Labels) -> ndarray:
    return labels.numpy().reshape(-1)


def components(count: int, pairs: TiedPairs) -> ndarray:
    """Return the component of each label: those that are tied, directly or through others, are in the same.

    Args:
        count: Number of labels.
        pairs: The pairs; `FIXED` ties nothing together.

    Returns:
        (labels,) the smallest label of the component.
    """
    root = np.arange(count)
    neither_fixed = (pairs.first != FIXED) & (pairs.second != FIXED)
    first = pairs.first[neither_fixed]
    second = pairs.second[neither_fixed]
    while True:
        apart = root[first] != root[second]
        if not apart.any():
            return root
        first = first[apart]
        second = second[apart]
        greater = np.maximum(root[first], root[second])
        smaller = np.minimum(root[first], root[second])
        np.minimum.at(root, greater, smaller)
        root = _shortened(root)


def _shortened(root: ndarray) -> ndarray:
    """Let every label point at the end of its way instead of at the next label."""
    while True:
        further = root[root]
        if (further == root).all():
            return root
        root = further


def with_same_widths(count: int, record: Record) -> list[Tie]:
    """Return the ties of a record, and those that let channels be as many as others that shape them.

    Channels that are among those others already, perhaps in another order, need no tie.

    Args:
        count: Number of labels.
        record: What the forward pass showed.
    """
    ties = list(record.ties)
    if not record.same_widths:
        return ties
    component_of = components(count, TiedPairs.of(ties))
    of_heads = of_attention(component_of, record)
    for tie in record.same_widths:
        first = component_of[tie.first.numpy()]
        second = component_of[tie.second.numpy()]
        if of_heads[first].any():  # which become as many as they have to, whatever shapes them
            continue
        if not np.isin(first, second).any():
            ties.append(tie)
            component_of = _joined(component_of, first, second)
    return ties


def of_attention(component_of: ndarray, record: Record) -> ndarray:
    """Return which components are channels of attention: (labels,) bool."""
    found = np.zeros(len(component_of), dtype=bool)
    for note in record.kinds:
        if note.why != "stream":
            found[component_of[note.labels.numpy()]] = True
    return found


def _joined(component_of: ndarray, first: ndarray, second: ndarray) -> ndarray:
    """Return the component of each label once some components are tied to others, each to the one at its place."""
    pairs = TiedPairs(first, second, np.array([len(first)]))
    of_components = components(len(component_of), pairs)
    return of_components[component_of]


def notes_on_half_fixed(ties: Sequence[Tie], pairs: TiedPairs) -> list[Note]:
    """Return what makes channels unprunable that are tied to positions which cannot be pruned.

    Args:
        ties: The ties.
        pairs: Their pairs.
    """
    is_half_fixed = (pairs.first == FIXED) != (pairs.second == FIXED)
    half_fixed = np.flatnonzero(is_half_fixed)
    notes = []
    for number in np.unique(pairs.tie_of(half_fixed)):
        tie = ties[number]
        first_fixed = tie.first == FIXED
        second_fixed = tie.second == FIXED
        met_by_first = tie.second[first_fixed & ~second_fixed]
        met_by_second = tie.first[second_fixed & ~first_fixed]
        labels = torch.cat([met_by_second, met_by_first])
        notes.append(Note(labels, tie.module, tie.why))
    return notes


def is_among(values: ndarray, ascending: ndarray) -> ndarray:
    """Tell which values are among others, which ascend."""
    places = np.searchsorted(ascending, values)
    inside = places < len(ascending)
    found = inside.copy()
    found[inside] = ascending[places[inside]] == values[inside]
    return found
