"""Sheets: the same network seen twice, where an axis of channels is split into heads and the width of each.

Labels can follow one of the two axes only. In one sheet they follow the width of heads, so that its groups are channels
at equal places in all heads; in the other they follow the heads. Both are put together here: a position of a weight may
then belong to a group of each sheet, and is there as long as both of its channels are.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy import ndarray

from lightning_prune.graph.channel_graph import Axis, Group, Term
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import CostTerm, Labels, Record

__all__ = ["Sheet", "joined_groups", "terms_of"]

_NONE = -1
Alternative = tuple[int, tuple[Axis, ...]]  # a coefficient, and the axes whose lengths it is multiplied by


@dataclass(frozen=True)
class Sheet:
    """What a network showed with labels along one of two axes.

    Attributes:
        grouping: The groups.
        record: What the full network showed in evaluation mode.
        names: What the groups are called once both sheets are put together, by number; empty for none.
    """

    grouping: Grouping
    record: Record
    names: Sequence[str]

    def names_along(self, labels: Labels | int, size: int) -> ndarray:
        """Return the number of the group of each position along an axis, -1 for none: (positions,)."""
        if isinstance(labels, int):
            return np.full(size, _NONE)
        return self.grouping.group_of[labels.numpy()]


def joined_groups(inner: Grouping, outer: Grouping) -> tuple[dict[str, Group], list[str]]:
    """Return the groups of both sheets, and what those of the second are called among them.

    Args:
        inner: The groups of the width of heads, and all others.
        outer: The groups of heads, and all others; those that are in the first too are in it once. One that does not
            lie across the groups of the first as heads do is left out.

    Returns:
        The groups by name, and names by number of the group; empty for those that are left out.
    """
    groups = dict(inner.groups)
    known = {_identity(group): name for name, group in inner.groups.items()}
    places = [_places(group) for group in inner.groups.values()]
    names = []
    for group in outer.groups.values():
        name = known.get(_identity(group), "")
        if not name and _lies_across(group, places):
            name = _new_name(group, groups)
            groups[name] = replace(group, name=name)
        names.append(name)
    return groups, names


def _identity(group: Group) -> tuple[object, ...]:
    return group.size, group.slices


def _new_name(group: Group, groups: Mapping[str, Group]) -> str:
    module = group.name.partition("#")[0]
    candidates = itertools.chain([module, f"{module}#{group.kind}"], (f"{module}#{n}" for n in itertools.count(2)))
    return next(name for name in candidates if name not in groups)


Place = tuple[str, int]  # tensor and axis
Channels = dict[Place, dict[int, int]]  # by place: the channel of each position


def _places(group: Group) -> Channels:
    """Return the channel that each position belongs to."""
    places: Channels = {}
    every = torch.arange(group.size)
    for one in group.slices:
        by_channel = one.positions(every).view(group.size, -1)
        for channel, positions in enumerate(by_channel.tolist()):
            places.setdefault((one.tensor, one.axis), {}).update(dict.fromkeys(positions, channel))
    return places


def _lies_across(group: Group, others: Iterable[Channels]) -> bool:
    """Tell whether each channel of a group has as many positions in common with each of another, where it has any."""
    own = _places(group)
    for other in others:
        for place in own.keys() & other.keys():
            if not _are_crossed(own[place], other[place]):
                return False
    return True


def _are_crossed(first: Mapping[int, int], second: Mapping[int, int]) -> bool:
    shared = first.keys() & second.keys()
    if not shared:
        return True
    pairs = [(first[position], second[position]) for position in shared]
    _, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
    combinations = len(set(first.values())) * len(set(second.values()))
    return len(counts) == combinations and len(set(counts.tolist())) == 1


# -- lengths -----------------------------------------------------------------------------------------------------------


class _Lengths:
    """Know the lengths of axes as functions of the widths of groups.

    Args:
        sheets: The sheets.
        groups: The groups of all of them.
    """

    def __init__(self, sheets: Sequence[Sheet], groups: Mapping[str, Group]) -> None:
        self.sheets = sheets
        self.groups = groups
        self._known: dict[tuple[int, ...], list[Alternative]] = {}

    def of(self, axis: Sequence[Labels | int]) -> list[Alternative]:
        """Return a length as a sum.

        Args:
            axis: For each sheet, the labels along the axis or its size.
        """
        if all(isinstance(one, int) for one in axis):
            return [(int(axis[0]), ())]
        key = tuple(map(id, axis))
        if key not in self._known:
            self._known[key] = self._alternatives(axis)
        return self._known[key]

    def _alternatives(self, axis: Sequence[Labels | int]) -> list[Alternative]:
        fixed = 0
        per_channel: dict[str, int] = {}
        products: list[Alternative] = []
        for names, positions in self._blocks(axis):
            if not names:
                fixed += positions
            elif len(names) == 1:
                per_channel[names[0]] = per_channel.get(names[0], 0) + positions // self.groups[names[0]].size
            else:
                products.append(self._product(names, positions))
        if fixed or per_channel or not products:
            products.append((1, (Axis(fixed, tuple(per_channel.items())),)))
        return products

    def _product(self, names: Sequence[str], positions: int) -> Alternative:
        """Return the positions that belong to a channel of each of some groups."""
        for name in names:
            positions //= self.groups[name].size
        return positions, tuple(Axis(0, ((name, 1),)) for name in names)

    def _blocks(self, axis: Sequence[Labels | int]) -> Iterator[tuple[list[str], int]]:
        """Yield the groups that positions along an axis belong to together, and how many do."""
        size = max(one if isinstance(one, int) else len(one) for one in axis)
        columns = [sheet.names_along(one, size) for sheet, one in zip(self.sheets, axis, strict=True)]
        numbers, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
        for row, positions in zip(numbers.tolist(), counts.tolist(), strict=True):
            names = [sheet.names[number] for sheet, number in zip(self.sheets, row, strict=True) if number >= 0]
            yield sorted(set(filter(None, names))), positions


def terms_of(
    costs: Iterable[Sequence[CostTerm]], sheets: Sequence[Sheet], groups: Mapping[str, Group]
) -> Iterator[Term]:
    """Yield costs as products of lengths of axes.

    Args:
        costs: Each cost, as every sheet has it.
        sheets: The sheets.
        groups: The groups of all of them.
    """
    lengths = _Lengths(sheets, groups)
    for same in costs:
        sums = [lengths.of(axis) for axis in zip(*(cost.axes for cost in same), strict=True)]
        for factors in itertools.product(*sums):
            coefficient = same[0].coefficient
            axes: list[Axis] = []
            for factor, factor_axes in factors:
                coefficient *= factor
                axes += factor_axes
            yield Term(coefficient, tuple(axes), same[0].module)
