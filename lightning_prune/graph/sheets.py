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
from torch import Tensor

from lightning_prune.graph.channel_graph import Axis, Group, Term
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import CostTerm, Labels, Record
from lightning_prune.pruning_plan import Slice, are_crossed

__all__ = ["Sheet", "is_pair", "joined_groups", "terms_of"]

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

    def without_pairs(self) -> "Sheet":
        """Return the sheet without the groups of two heads."""
        names = []
        for name, group in zip(self.names, self.grouping.groups.values(), strict=True):
            names.append("" if is_pair(group) else name)
        return replace(self, names=names)

    def names_along(self, labels: Labels | int, size: int) -> ndarray:
        """Return the number of the group of each position along an axis, -1 for none: (positions,)."""
        if isinstance(labels, int):
            return np.full(size, _NONE)
        return self.grouping.group_of[labels.numpy()]


def is_pair(group: Group) -> bool:
    """Tell whether a group has two heads: where one of them is left, it shows nowhere in the shapes."""
    return group.kind == "heads" and group.size == 2


def joined_groups(inner: Grouping, outer: Sheet) -> tuple[dict[str, Group], list[str]]:
    """Return the groups of both sheets, and what those of the second are called among them.

    Args:
        inner: The groups of the width of heads, and all others.
        outer: The sheet of heads, and all others; those that are in the first too are in it once. One that does not
            lie across the groups of the first as heads do is left out, as are those without a name.

    Returns:
        The groups by name, and names by number of the group; empty for those that are left out.
    """
    groups = dict(inner.groups)
    known = {_identity(group): name for name, group in inner.groups.items()}
    places = _Places(inner.groups.values())
    names = []
    for named, group in zip(outer.names, outer.grouping.groups.values(), strict=True):
        name = known.get(_identity(group), "")
        if named and not name and places.lies_across(group):
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


class _Places:
    """Know which channels of some groups lie where.

    Args:
        groups: The groups, no two of which lie at the same position.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self._slices: dict[tuple[str, int], list[tuple[Group, Slice]]] = {}
        for group in groups:
            for one in group.slices:
                self._slices.setdefault((one.tensor, one.axis), []).append((group, one))

    def lies_across(self, group: Group) -> bool:
        """Tell whether each channel of a group has as many positions in common with each of those that it meets."""
        own: dict[tuple[str, int], list[Tensor]] = {}
        for one in group.slices:
            place = one.tensor, one.axis
            own.setdefault(place, []).append(_positions(group, one))
        for place, slices in own.items():
            of_group = torch.cat(slices, dim=1)
            for others in self._at(place).values():
                if not are_crossed(of_group, torch.cat(others, dim=1)):
                    return False
        return True

    def _at(self, place: tuple[str, int]) -> dict[str, list[Tensor]]:
        """Return the positions of the groups that lie along an axis, by name."""
        found: dict[str, list[Tensor]] = {}
        for group, one in self._slices.get(place, ()):
            found.setdefault(group.name, []).append(_positions(group, one))
        return found


def _positions(group: Group, one: Slice) -> Tensor:
    """Return where the channels of a group lie: (channels, positions of each)."""
    every = torch.arange(group.size)
    return one.positions(every).view(group.size, -1)


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
        columns = [
            sheet.names_along(one, size)
            for sheet, one in zip(
                self.sheets,
                axis,
                strict=True,
            )
        ]
        numbers, counts = np.unique(
            np.stack(columns, axis=1),
            axis=0,
            return_counts=True,
        )
        for row, positions in zip(
            numbers.tolist(),
            counts.tolist(),
            strict=True,
        ):
            names = [
                sheet.names[number]
                for sheet, number in zip(
                    self.sheets,
                    row,
                    strict=True,
                )
                if number >= 0
            ]
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
            yield Term(
                coefficient,
                tuple(axes),
                same[0].module,
            )
