"""Groups of channels, formed from the labels that a forward pass tied together.

The smallest network shows all of it, ``Sequential(Linear(1, 2), ReLU(), Linear(2, 1))``. Axes of one position have no
labels, so that there are six:

============  ====  ======
tensor        axis  labels
============  ====  ======
``0.weight``  0     1, 2
``0.bias``    0     3, 4
``2.weight``  1     5, 6
============  ====  ======

1. *Ties.* The first layer adds its bias: 1 is tied to 3, 2 to 4. Its output has the labels 1 and 2, the ReLU passes
   them on, and the second layer multiplies them by its weight: 1 is tied to 5, 2 to 6.
2. *Components* of tied labels: {1, 3, 5} and {2, 4, 6}.
3. *Channels* are the components with a label of an out-channel slice. The first layer produces channels along
   ``0.weight``, axis 0, labels 1 and 2: both components are channels.
4. *Groups* are channels that are alike: both have one label in each of the same three slots, and nothing makes either
   unprunable. So they are channels 0 and 1 of one group.
5. *Slices.* The group has labels in three slots: 1 and 2 are positions of an out-channel slice, 5 and 6 of an
   in-channel slice, since the second layer consumes channels along ``2.weight``, axis 1; 3 and 4 are of neither.
6. *Name.* A group has the name of the module that produces its channels first: ``0``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy import ndarray

from lightning_prune.graph.channel_graph import Axis, Group, Unprunable
from lightning_prune.graph.numbering import Numbering, number_labels
from lightning_prune.graph.records import FIXED, Labels, LeastRequired, Note, Record, Tie
from lightning_prune.graph.slices import slices_of
from lightning_prune.graph.slots import Slot, SlotTable, module_of
from lightning_prune.graph.ties import TiedPairs, components, notes_on_half_fixed, with_same_widths
from lightning_prune.pruning_plan import Slice, width_in

__all__ = ["Grouping", "Reasons", "UnprunableChannels", "form_groups", "marked"]

_NONE = -1  # the number of no group, no channel, no note


@dataclass(frozen=True)
class Reasons:
    """The first of some notes about each component.

    Attributes:
        notes: The notes.
        component_of: (labels,) the component of each label.
        first: (labels,) by component, the number of the first note about it, -1 for none.
    """

    notes: Sequence[Note]
    component_of: ndarray
    first: ndarray

    def about(self, labels: ndarray) -> str:
        """Return the reason of the first of some labels that there is one for, empty where there is none."""
        numbers = self.first[self.component_of[labels]]
        with_reason = numbers[numbers != _NONE]
        return str(self.notes[with_reason[0]]) if len(with_reason) else ""


class UnprunableChannels(dict[str, Unprunable]):
    """The channels that cannot be pruned, by the name of the module that produces them.

    A module whose channels are unprunable for several reasons has an entry for each: ``name``, ``name#1`` ...

    Attributes:
        tensors: Names of the tensors that produce them.
        reasons: What cannot be pruned and why: (module, reason).

    Example:
        >>> channels = UnprunableChannels()
        >>> channels.add("attention", 8, "attention: is the width of an attention head")
        >>> channels.add("attention", 4, "attention: is an output of the network")
        >>> {name: one.channels for name, one in channels.items()}
        {'attention': 8, 'attention#1': 4}
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[str] = set()
        self.reasons: set[tuple[str, str]] = set()

    def add(self, module: str, channels: int, reason: str) -> None:
        """Add channels that a module produces."""
        self.reasons.add((module, reason))
        name = module
        number = 0
        while name in self and self[name].reason != reason:
            number += 1
            name = f"{module}#{number}"
        before = self.get(name, Unprunable(0, reason))
        self[name] = Unprunable(before.channels + channels, reason)


@dataclass
class Grouping:
    """Channel groups, and the group that each label belongs to.

    Attributes:
        groups: The groups, in the order of the forward pass, by name.
        unprunable: The channels that cannot be pruned.
        group_of: (labels,) the number of the group of each label, -1 where it is in none.
        pairs: Every pair of labels that was tied.
        why_unprunable: The reasons why components cannot be pruned.
    """

    groups: dict[str, Group]
    unprunable: UnprunableChannels
    group_of: ndarray
    pairs: TiedPairs
    why_unprunable: Reasons = field(repr=False)

    @cached_property
    def names(self) -> list[str]:
        """The names of the groups, by number."""
        return list(self.groups)

    @cached_property
    def tied_codes(self) -> ndarray:
        """Every pair of different labels that was tied, by code (see `TiedPairs.codes`), ascending."""
        return self.pairs.sorted_codes(len(self.group_of))

    def add_not_mask_exact(self, notes: Iterable[Note]) -> None:
        """Add why pruning is not the same as masking, for groups that no reason was known of."""
        for note in notes:
            numbers = np.unique(self.group_of[note.labels.numpy()])
            for number in numbers[numbers >= 0].tolist():
                group = self.groups[self.names[number]]
                if group.mask_exact:
                    self.groups[group.name] = replace(group, not_mask_exact=str(note))

    def axis(self, labels: Labels) -> Axis:
        """Return how the length of an axis depends on the groups."""
        group_of = self.group_of[labels.numpy()]
        is_in_group = group_of >= 0
        fixed = int(np.count_nonzero(~is_in_group))
        present, positions_in_group = np.unique(group_of[is_in_group], return_counts=True)
        per_channel = []
        for number, positions in zip(present.tolist(), positions_in_group.tolist(), strict=True):
            name = self.names[number]
            positions_per_channel = positions // self.groups[name].size
            per_channel.append((name, positions_per_channel))
        return Axis(fixed, tuple(per_channel))


@dataclass(frozen=True)
class _Sides:
    """Which labels are positions of out-channel slices, and which of in-channel slices: (labels,) bool each."""

    is_out: ndarray
    is_in: ndarray


@dataclass(frozen=True)
class _Block:
    """The labels of one group in one slot: (channels, labels of a channel)."""

    slot: Slot
    labels: ndarray


def form_groups(table: SlotTable, record: Record, elsewhere: ndarray | None = None) -> Grouping:
    """Form channel groups from what a forward pass showed; the module's docstring does it by hand.

    A channel is a component of tied labels in which some weight produces a channel. Channels form a group when they
    lie in the same slots, equally often, cost the same, and have the same reason to be unprunable, if any.

    Args:
        table: The labels of all tensors.
        record: What the forward pass showed.
        elsewhere: (labels,) bool, what can be pruned in another way, of which it is not said that it cannot.
    """
    ties = with_same_widths(table.count, record)
    pairs = TiedPairs.of(ties)
    component_of = components(table.count, pairs)
    sides = _sides(table.count, record)
    unprunable = [*notes_on_half_fixed(ties, pairs), *record.unprunable]
    kinds = _kinds(component_of, record)
    normed = [note for note in record.normed if not kinds.are_summed(note.labels.numpy())]
    not_mask_exact = [*record.not_mask_exact, *normed, *_not_masked_alone(table, record.ties, sides)]
    why_unprunable = _reasons(component_of, unprunable)
    why_not_mask_exact = _reasons(component_of, not_mask_exact)

    numbering = number_labels(table, component_of, record, reason_of=why_unprunable.first)
    builder = _Builder(sides, kinds, why_unprunable, why_not_mask_exact, elsewhere)
    for number, blocks in enumerate(_blocks(table, numbering)):
        builder.add(number, blocks)
    grouping = Grouping(
        builder.groups,
        builder.unprunable,
        group_of=builder.number_in_order[numbering.group],
        pairs=pairs,
        why_unprunable=why_unprunable,
    )
    _require_channels(grouping, record.least_required)
    return grouping


# -- what is known of labels and components ----------------------------------------------------------------------------


def _sides(count: int, record: Record) -> _Sides:
    """Return which labels the rules marked as out-channel or in-channel slices."""
    is_out = marked(count, record.out_slices)
    is_out[FIXED] = False
    return _Sides(is_out, marked(count, record.in_slices))


def marked(count: int, marks: Iterable[Labels]) -> ndarray:
    """Return which labels are among some: (labels,) bool."""
    found = np.zeros(count, dtype=bool)
    for labels in marks:
        found[labels.numpy()] = True
    return found


def _not_masked_alone(table: SlotTable, ties: Sequence[Tie], sides: _Sides) -> list[Note]:
    """Note in-channel slices of weights that also produce channels, or that are computed from more than one weight."""
    among_weights = TiedPairs.of([tie for tie in ties if tie.of_weights])
    weight_of = components(table.count, among_weights)
    is_weight_consuming = np.zeros(table.count, dtype=bool)
    is_weight_consuming[weight_of[sides.is_in]] = True
    is_computed_with_others = is_weight_consuming[weight_of] & ~sides.is_in
    is_on_both_sides = sides.is_out & sides.is_in
    found = is_computed_with_others | is_on_both_sides
    found[FIXED] = False
    if not found.any():
        return []
    why = "reads channels by a weight that cannot be masked alone"
    notes = []
    for slot in table.slots:
        positions = np.flatnonzero(found[slot.start : slot.stop])
        if len(positions):
            labels = torch.from_numpy(slot.start + positions)
            notes.append(Note(labels, module_of(slot.tensor), why))
    return notes


def _reasons(component_of: ndarray, notes: Sequence[Note]) -> Reasons:
    """Return the first note about each component."""
    first = np.full(len(component_of), _NONE)
    numbered = list(enumerate(notes))
    for number, note in reversed(numbered):  # so that the first is written last
        labels = note.labels.numpy()
        components_of_note = component_of[labels]
        first[components_of_note] = number
    fixed = component_of[FIXED]
    first[fixed] = _NONE
    return Reasons(notes, component_of, first)


_KINDS = ("query-key", "value", "heads", "stream")  # of channels that are of several kinds the first


@dataclass(frozen=True)
class _Kinds:
    """What is known of the kind of channels.

    Attributes:
        component_of: (labels,) the component of each label.
        kind_of: (labels,) by component, the number of its kind, that of all kinds for plain channels.
        is_summed: (labels,) by component, whether products of its channels are summed up.
    """

    component_of: ndarray
    kind_of: ndarray
    is_summed: ndarray

    def kind(self, label: ndarray, slices: int) -> str:
        """Return the kind of the channels that a label is of, which lie in some number of out-channel slices."""
        number = self.kind_of[self.component_of[label[0]]]
        kind = _KINDS[number] if number < len(_KINDS) else "channels"
        is_one_layer = kind == "stream" and slices == 1
        return "channels" if is_one_layer else kind

    def are_summed(self, label: ndarray) -> bool:
        """Tell whether products of the channels that a label is of are summed up."""
        return bool(self.is_summed[self.component_of[label[0]]])


def _kinds(component_of: ndarray, record: Record) -> _Kinds:
    kind_of = np.full(len(component_of), len(_KINDS))
    for note in record.kinds:
        components_of_note = component_of[note.labels.numpy()]
        kind_of[components_of_note] = np.minimum(kind_of[components_of_note], _KINDS.index(note.why))
    is_summed = np.zeros(len(component_of), dtype=bool)
    for labels in record.summed:
        is_summed[component_of[labels.numpy()]] = True
    return _Kinds(component_of, kind_of, is_summed)


# -- groups and their slices -------------------------------------------------------------------------------------------


def _blocks(table: SlotTable, numbering: Numbering) -> list[list[_Block]]:
    """Return the labels of every group, slot by slot in ascending order, by the number of the group."""
    count = int(numbering.group.max()) + 1
    blocks: list[list[_Block]] = [[] for _ in range(count)]
    for number, slot, labels in _labels_by_block(table, numbering):
        channels = numbering.channel[labels[-1]] + 1
        block = _Block(table.slots[slot], labels.reshape(channels, -1))
        blocks[number].append(block)
    return blocks


def _labels_by_block(table: SlotTable, numbering: Numbering) -> Iterator[tuple[int, int, ndarray]]:
    """Yield the number of a group, that of a slot and the labels of that group in there, channel by channel."""
    slots = len(table.slots)
    slot = np.repeat(np.arange(-1, slots), [1, *table.sizes])
    labels = np.flatnonzero(numbering.group >= 0)
    if not len(labels):
        return
    block = numbering.group[labels] * slots + slot[labels]
    channel = numbering.channel[labels]
    order = np.argsort(block * (channel.max() + 1) + channel, kind="stable")
    in_order = labels[order]
    ends = np.append(np.flatnonzero(np.diff(block[order])) + 1, len(labels))
    numbers = block[order[ends - 1]]
    start = 0
    for end, number in zip(ends.tolist(), numbers.tolist(), strict=True):
        yield *divmod(number, slots), in_order[start:end]
        start = end


class _Builder:
    """Build groups one after the other, and set apart those that cannot be pruned.

    Args:
        sides: Which labels are out-channel or in-channel slices.
        kinds: What is known of the kind of channels.
        why_unprunable: The reasons why components cannot be pruned.
        why_not_mask_exact: The reasons why pruning them is not the same as masking.
        elsewhere: (labels,) bool, what can be pruned in another way.

    Attributes:
        groups: The groups that can be pruned, by name.
        unprunable: The channels that cannot.
    """

    def __init__(
        self,
        sides: _Sides,
        kinds: _Kinds,
        why_unprunable: Reasons,
        why_not_mask_exact: Reasons,
        elsewhere: ndarray | None,
    ) -> None:
        self.sides = sides
        self.kinds = kinds
        self.why_unprunable = why_unprunable
        self.why_not_mask_exact = why_not_mask_exact
        self.elsewhere = elsewhere
        self.groups: dict[str, Group] = {}
        self.unprunable = UnprunableChannels()
        self._numbers: list[int] = []

    @property
    def number_in_order(self) -> ndarray:
        """By number of a group added, its number among those that can be pruned; the last, at -1, is for no group."""
        return np.array([*self._numbers, _NONE])

    def add(self, number: int, blocks: Sequence[_Block]) -> None:
        """Add the group of some number."""
        group = self._make_group(blocks)
        reason = self.why_unprunable.about(_first_label(blocks)) or _why_too_small(group)
        if reason:
            self._numbers.append(_NONE)
            if not self._can_be_pruned_elsewhere(blocks):
                self._add_unprunable(group, reason)
            return
        self._numbers.append(len(self.groups))
        name = group.name
        if name in self.groups:
            name = f"{name}#{number}"
        self.groups[name] = replace(group, name=name)

    def _can_be_pruned_elsewhere(self, blocks: Sequence[_Block]) -> bool:
        """Tell whether all that produces the channels can be pruned in another way."""
        if self.elsewhere is None:
            return False
        labels = np.concatenate([block.labels.reshape(-1) for block in blocks])
        produced = labels[self.sides.is_out[labels]]
        return bool(self.elsewhere[produced].all())

    def _add_unprunable(self, group: Group, reason: str) -> None:
        """Add the channels to every module that produces them."""
        modules = set()
        for out_slice in group.out_slices:
            tensor = out_slice.tensor
            self.unprunable.tensors.add(tensor)
            module = module_of(tensor)
            if module not in modules:
                modules.add(module)
                width = width_in(group.out_slices, tensor, out_slice.axis)
                self.unprunable.add(module, group.size * width, reason)

    def _make_group(self, blocks: Sequence[_Block]) -> Group:
        out_slices: list[Slice] = []
        in_slices: list[Slice] = []
        other_slices: list[Slice] = []
        for block in blocks:
            positions = block.labels - block.slot.start
            first_label = block.labels[0, 0]
            if self.sides.is_out[first_label]:
                slices = out_slices
            elif self.sides.is_in[first_label]:
                slices = in_slices
            else:
                slices = other_slices
            slices.extend(slices_of(block.slot, positions))
        if self.kinds.are_summed(_first_label(blocks)):
            in_slices += out_slices + other_slices  # what is not zero there counts in the sum
        return Group(
            name=module_of(out_slices[0].tensor),
            size=len(blocks[0].labels),
            out_slices=tuple(out_slices),
            in_slices=tuple(in_slices),
            other_slices=tuple(other_slices),
            not_mask_exact=self.why_not_mask_exact.about(_first_label(blocks)),
            kind=self.kinds.kind(_first_label(blocks), len(out_slices)),
        )


def _first_label(blocks: Sequence[_Block]) -> ndarray:
    """Return a label of the first channel of a group: (1,)."""
    return blocks[0].labels[0, :1]


def _why_too_small(group: Group) -> str:
    """Say why a group of a single channel cannot be pruned, empty if it has more."""
    if group.size > 1:
        return ""
    if group.width > 1:
        return f"{group.name}: all its channels can only be pruned together"
    return f"{group.name}: has a channel that is unlike all others, and the only one of its group"


def _require_channels(grouping: Grouping, required: Iterable[LeastRequired]) -> None:
    """Let groups keep as many channels as an axis must have."""
    for labels, channels in required:
        axis = grouping.axis(labels)
        if axis.fixed > 0 or len(axis.groups) != 1:
            continue
        [(name, positions_per_channel)] = axis.groups
        group = grouping.groups[name]
        least = math.ceil(channels / positions_per_channel)
        if least > group.least:
            grouping.groups[name] = replace(group, least=least)
