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
from lightning_prune.graph.records import FIXED, CostTerm, Labels, Record
from lightning_prune.pruning_plan import Slice, are_crossed

__all__ = ["Lengths", "Sheet", "axes_of", "is_pair", "joined_groups", "terms_of"]

Alternative = tuple[int, tuple[Axis, ...]]  # a coefficient, and the axes whose lengths it is multiplied by
AxisInSheets = Sequence[Labels | int]  # for each sheet, the labels along an axis or its size
Block = tuple[list[str], int]  # the groups that positions along an axis belong to together, and how many do


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

    def groups_along(self, axes: Sequence[Labels | int], sizes: Sequence[int]) -> ndarray:
        """Return the number of the group of each position along some axes, -1 for none: (positions of all,).

        Args:
            axes: The labels along each, or its size.
            sizes: How long each is.
        """
        labels = []
        for one, size in zip(
            axes,
            sizes,
            strict=True,
        ):
            labels.append(np.full(size, FIXED) if isinstance(one, int) else one.numpy())
        return self.grouping.group_of[np.concatenate(labels)]


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


class Lengths:
    """Know the lengths of axes as functions of the widths of groups.

    Args:
        sheets: The sheets.
        groups: The groups of all of them.
        axes: The axes, each as its labels or its size in every sheet.
    """

    def __init__(self, sheets: Sequence[Sheet], groups: Mapping[str, Group], axes: Iterable[AxisInSheets]) -> None:
        self.sheets = sheets
        self.groups = groups
        distinct = {_identities(axis): axis for axis in axes if not _is_plain(axis)}
        blocks = self._blocks(list(distinct.values()))
        self._known = {}
        for key, of_axis in zip(
            distinct,
            blocks,
            strict=True,
        ):
            self._known[key] = self._alternatives(of_axis)

    def of(self, axis: AxisInSheets) -> list[Alternative]:
        """Return the length of one of the axes as a sum."""
        if _is_plain(axis):
            return [(int(axis[0]), ())]
        return self._known[_identities(axis)]

    def _alternatives(self, blocks: Sequence[Block]) -> list[Alternative]:
        fixed = 0
        per_channel: dict[str, int] = {}
        products: list[Alternative] = []
        for names, positions in blocks:
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

    def _blocks(self, axes: Sequence[AxisInSheets]) -> list[list[Block]]:
        """Return, for each axis, the groups that positions along it belong to together, and how many do."""
        blocks: list[list[Block]] = [[] for _ in axes]
        if not axes:
            return blocks
        sizes = [max(map(_size, axis)) for axis in axes]
        columns = [np.repeat(np.arange(len(axes)), sizes)]
        for sheet, of_axes in zip(
            self.sheets,
            zip(*axes, strict=True),
            strict=True,
        ):
            columns.append(sheet.groups_along(of_axes, sizes))
        for row, positions in _counted_rows(columns):
            number, *numbers = row
            names = [sheet.names[one] for sheet, one in zip(self.sheets, numbers, strict=True) if one >= 0]
            block = sorted(set(filter(None, names))), positions
            blocks[number].append(block)
        return blocks


def _is_plain(axis: AxisInSheets) -> bool:
    """Tell whether an axis has no labels in any sheet."""
    return all(isinstance(one, int) for one in axis)


def _identities(axis: AxisInSheets) -> tuple[int, ...]:
    return tuple(map(id, axis))


def _size(one: Labels | int) -> int:
    return one if isinstance(one, int) else len(one)


def _counted_rows(columns: Sequence[ndarray]) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of a table, each once and in ascending order, and how often it has each.

    Neighbouring rows are mostly alike, so that they are counted together before anything is sorted.

    Args:
        columns: (rows,) numbers from -1 on, by column.
    """
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        codes = codes * (int(column.max()) + 2) + column + 1
    ends = np.append(np.flatnonzero(np.diff(codes)) + 1, len(codes))
    starts = np.append(0, ends[:-1])
    _, first, which = np.unique(
        codes[starts],
        return_index=True,
        return_inverse=True,
    )
    counts = np.bincount(which, weights=ends - starts)
    rows = np.stack([column[starts[first]] for column in columns], axis=1)
    yield from zip(
        rows.tolist(),
        counts.astype(int).tolist(),
        strict=True,
    )


def terms_of(costs: Iterable[Sequence[CostTerm]], lengths: Lengths) -> Iterator[Term]:
    """Yield costs as products of lengths of axes.

    Args:
        costs: Each cost, as every sheet has it.
        lengths: The lengths of all of their axes.
    """
    for same in costs:
        sums = [lengths.of(axis) for axis in axes_of(same)]
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


def axes_of(same: Sequence[CostTerm]) -> Iterator[AxisInSheets]:
    """Yield the axes of a cost, each as every sheet has it."""
    return zip(*(cost.axes for cost in same), strict=True)
