"""Comparison of a network that has fewer channels with the full one: what it must show, and where it first does not."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy import ndarray

from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import Labels, Note, OperatorStep, OutputLabels, Record, Tie
from lightning_prune.graph.ties import TiedPairs, is_among

__all__ = ["Expectations", "KeptLabels", "covers", "first_shift"]

_NO_LABELS = torch.zeros(0, dtype=torch.int64)


class KeptLabels:
    """The labels that a smaller network keeps.

    Args:
        is_kept: (labels,) which labels are kept.
        is_prunable: (labels,) which labels belong to groups; those of others need not be at the same places, as where
            a network picks rows by values.
        with_others: Whether fewer heads are left too, whose widths an axis has side by side.

    Example:
        >>> kept = KeptLabels(np.array([True, True, False, True]), np.array([False, True, True, False]))
        >>> kept.among(torch.tensor([3, 2, 1]))
        tensor([3, 1])
        >>> kept.agree({0: torch.tensor([3])}, {}), kept.agree({0: torch.tensor([1])}, {})
        (True, False)
        >>> of_heads = KeptLabels(np.array([True, True, False, True]), np.array([False, True, True, False]), True)
        >>> one, two = torch.tensor([1]), torch.tensor([1, 1])
        >>> of_heads.agree({0: two}, {0: one}), of_heads.agree({0: two}, {})
        (True, False)
    """

    def __init__(self, is_kept: ndarray, is_prunable: ndarray, with_others: bool = False) -> None:
        self._with_others = with_others
        self._is_kept = torch.from_numpy(is_kept)
        self._is_prunable = is_prunable
        self._known_to_agree: set[tuple[int, int]] = set()

    def among(self, labels: Labels) -> Labels:
        """Return the kept ones of some labels, in order."""
        return labels[self._is_kept[labels]]

    def of(self, labels: ndarray) -> ndarray:
        """Return which of some labels are kept: (labels,) bool."""
        kept: ndarray = self._is_kept.numpy()[labels]
        return kept

    def concern(self, axes: Iterable[Labels]) -> bool:
        """Tell whether any label along some axes belongs to a group."""
        return any(self._is_prunable[labels.numpy()].any() for labels in axes)

    def comparable(self, record: Record) -> Record:
        """Return what a pass showed but for operators of a pass on real data that have to do with no group.

        How often these run may depend on values, as where boxes are pasted one by one.
        """
        if not record.given_labels:
            return record
        steps = zip(record.given_labels, record.output_labels, strict=True)
        numbers = [number for number, (given, made) in enumerate(steps) if self.concern([*given, *made.values()])]
        return replace(
            record,
            operator_trace=[record.operator_trace[number] for number in numbers],
            output_labels=[record.output_labels[number] for number in numbers],
            given_labels=[record.given_labels[number] for number in numbers],
        )

    def agree(self, full: OutputLabels, small: OutputLabels) -> bool:
        """Tell whether an output of the smaller network has just the kept channels of that of the full one."""
        for axis in full.keys() | small.keys():
            expected = full.get(axis, _NO_LABELS)
            found = small.get(axis, _NO_LABELS)
            if not self._are_kept_ones(expected, found):
                return False
        return True

    def _are_kept_ones(self, expected: Labels, found: Labels) -> bool:
        both = id(expected), id(found)  # most operators pass on the very labels that they are given
        if both in self._known_to_agree:
            return True
        among = self.among(expected)
        agree = torch.equal(among, found) or not self.concern((expected, found))
        if not agree and self._with_others:
            agree = _is_repeated_less(among, found)
        if agree:
            self._known_to_agree.add(both)
        return agree


def _is_repeated_less(expected: Labels, found: Labels) -> bool:
    """Tell whether labels are those that are expected but for repetitions, one after the other or side by side."""
    if not len(found):
        return False
    once = found.unique_consecutive()
    if len(once) == len(found):  # one after the other
        once = found[: len(found.unique())]
        return all(torch.equal(labels, once.repeat(len(labels) // len(once))) for labels in (expected, found))
    times = len(found) // len(once)
    return torch.equal(found, once.repeat_interleave(times)) and torch.equal(expected.unique_consecutive(), once)


def first_shift(full: Record, small: Record, kept: KeptLabels, start: int, stop: int) -> int | None:
    """Find the first operator whose output does not have just the kept channels of what it has in the full network.

    Args:
        full: What the full network showed.
        small: What the smaller network showed.
        kept: The labels that the smaller network keeps.
        start: Number of the operator to start with.
        stop: Number of the operator to stop before.

    Returns:
        Its number; None if there is no such operator before the networks run different ones.
    """
    end = min(stop, len(full.operator_trace), len(small.operator_trace))
    for number in range(start, end):
        rule_in_full = full.operator_trace[number][0]
        rule_in_small = small.operator_trace[number][0]
        if rule_in_small is not rule_in_full:
            return None
        if not kept.agree(full.output_labels[number], small.output_labels[number]):
            return number
    return None


def covers(small: Record, full: Record, kept: KeptLabels) -> bool:
    """Tell whether a smaller network did all that the full one did, in order, to just the kept channels.

    Args:
        small: What the smaller network showed; it may have done more.
        full: What the full network showed.
        kept: The labels that the smaller network keeps.
    """
    steps = zip(small.operator_trace, small.output_labels, strict=True)
    for step, labels in zip(full.operator_trace, full.output_labels, strict=True):
        if not _goes_on_to(steps, step, labels, kept):
            return False
    return True


def _goes_on_to(
    steps: Iterator[tuple[OperatorStep, OutputLabels]], expected: OperatorStep, labels: OutputLabels, kept: KeptLabels
) -> bool:
    """Go through the steps of a smaller network up to one that the full network took; tells whether there is one."""
    return any(step == expected and kept.agree(labels, found) for step, found in steps)


class Expectations:
    """What groups lead to expect of a network in which some have fewer channels: nothing more is tied or unprunable.

    Where something else is tied, positions have shifted against each other, because a size is written into the code.

    Args:
        grouping: The groups.
        count: Number of labels.
    """

    def __init__(self, grouping: Grouping, count: int) -> None:
        self.grouping = grouping
        self.count = count
        self.is_prunable = grouping.group_of >= 0  # (labels,)

    def groups_of(self, axes: Sequence[Labels]) -> frozenset[int]:
        """Return the numbers of the groups that the labels along some axes belong to."""
        if not axes:
            return frozenset()
        labels = np.concatenate([along.numpy() for along in axes])
        numbers = np.unique(self.grouping.group_of[labels])
        groups = numbers[numbers >= 0]
        return frozenset(groups.tolist())

    def any_prunable(self, axes: Iterable[Labels]) -> bool:
        """Tell whether any label along some axes belongs to a group."""
        for labels in axes:
            is_prunable = self.is_prunable[labels.numpy()]
            if is_prunable.any():
                return True
        return False

    def first_unprunable(self, notes: Sequence[Note]) -> int | None:
        """Find the first note that makes channels of a group unprunable."""
        for number, note in enumerate(notes):
            if self.any_prunable([note.labels]):
                return number
        return None

    def first_new_tie(self, ties: Sequence[Tie], kept: KeptLabels) -> int | None:
        """Find the first tie of channels of groups that the full network does not tie.

        Args:
            ties: What a smaller network ties.
            kept: The labels that it keeps.
        """
        return next(iter(self.new_ties(ties, kept)), None)

    def new_ties(self, ties: Sequence[Tie], kept: KeptLabels) -> list[int]:
        """Find the ties of channels of groups that the full network does not tie, up to the first of unequal sides.

        Args:
            ties: What a smaller network ties.
            kept: The labels that it keeps.
        """
        of_equal_sides: list[Tie] = []
        for tie in ties:
            if tie.first.numel() == tie.second.numel():
                of_equal_sides.append(tie)
            elif self.groups_of(tie.sides):
                break
            else:
                of_equal_sides.append(Tie(_NO_LABELS, _NO_LABELS, tie.module, tie.why))
        found = self._with_new_pairs(of_equal_sides, kept)
        if len(of_equal_sides) < len(ties):
            found.append(len(of_equal_sides))
        return found

    def _with_new_pairs(self, ties: Sequence[Tie], kept: KeptLabels) -> list[int]:
        """Find those of some ties that tie a pair of labels which is not tied in the full network."""
        pairs = TiedPairs.of(ties)
        if self._are_kept_ones(pairs, kept):
            return []
        # Not only of the same channel, but the very positions that met before: the order within a channel counts too.
        differ = pairs.first != pairs.second
        prunable = self.is_prunable[pairs.first] | self.is_prunable[pairs.second]
        candidates = np.flatnonzero(differ & prunable)
        codes = pairs.codes(self.count)[candidates]
        known = is_among(codes, self.grouping.tied_codes)
        new = candidates[~known]
        numbers = np.unique(pairs.tie_of(new))
        return [int(number) for number in numbers]

    def _are_kept_ones(self, pairs: TiedPairs, kept: KeptLabels) -> bool:
        """Tell whether pairs are those of the full network that are kept, one after the other, as they mostly are."""
        known = self.grouping.pairs
        are_kept = kept.of(known.first) & kept.of(known.second)
        count = len(pairs.first)
        is_same_first = np.array_equal(known.first[are_kept][:count], pairs.first)
        return is_same_first and np.array_equal(known.second[are_kept][:count], pairs.second)

    def are_met(self, record: Record, kept: KeptLabels) -> bool:
        """Tell whether a smaller network, which keeps some labels, tied nothing new and made nothing unprunable."""
        new_tie = self.first_new_tie(record.ties, kept)
        unprunable = self.first_unprunable(record.unprunable)
        return new_tie is None and unprunable is None
