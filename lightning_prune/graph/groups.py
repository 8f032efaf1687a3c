"""From the labels that a forward pass tied together to channel groups."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lightning_prune.graph.channel_graph import Axis, Group, Term, Unprunable
from lightning_prune.graph.tracer import FIXED, CostTerm, Labels, Note, Record, Tie
from lightning_prune.pruning_plan import Slice

__all__ = ["Coupling", "Slot", "couple"]


@dataclass(frozen=True)
class Slot:
    """One dimension of one tensor, and the range of labels that its positions have.

    Attributes:
        tensor: Dotted name of the parameter or buffer.
        axis: The dimension.
        start: The label of the first position; the others follow.
        size: Number of positions.
    """

    tensor: str
    axis: int
    start: int
    size: int


@dataclass
class Coupling:
    """Channel groups, with the channel that each label belongs to.

    Attributes:
        groups: The groups that can lose channels.
        unprunable: The channels that cannot be pruned.
        component: (labels,) the number of the component of tied labels that each label is in.
        group_of: (labels,) the index of the group of each label, -1 where it is in none.
        channel_of: (labels,) its channel within the group.
        pairs: Every pair of different labels that was tied, as one number each: the first times the number of labels,
            plus the second; ascending. (Not without repetition, which takes longer to find than to search through.)
    """

    groups: dict[str, Group]
    unprunable: dict[str, Unprunable]
    component: np.ndarray
    group_of: np.ndarray
    channel_of: np.ndarray
    pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def axis(self, labels: Labels) -> Axis:
        """Return how the length of an axis depends on the groups."""
        group = self.group_of[labels.numpy()]
        names = list(self.groups)
        counts = np.bincount(group[group >= 0], minlength=len(names))
        return Axis(
            int((group < 0).sum()),
            tuple((names[i], int(counts[i]) // self.groups[names[i]].size) for i in counts.nonzero()[0]),
        )

    def term(self, cost: CostTerm, known: dict[int, Axis]) -> Term:
        """Return a cost as a product of axis lengths; ``known`` remembers the axes seen, by identity of the labels."""
        axes = []
        for labels in cost.axes:
            if id(labels) not in known:
                known[id(labels)] = self.axis(labels)
            axes.append(known[id(labels)])
        return Term(cost.coefficient, tuple(axes), cost.module)


def _components(count: int, ties: list[Tie]) -> np.ndarray:
    """Number the connected components of labels: (labels,) the smallest label of each component."""
    parent = np.arange(count)
    if not ties:
        return parent
    first = np.concatenate([tie.first.numpy().reshape(-1) for tie in ties])
    second = np.concatenate([tie.second.numpy().reshape(-1) for tie in ties])
    both = (first != FIXED) & (second != FIXED)
    first, second = first[both], second[both]
    while True:
        one, other = parent[first], parent[second]
        apart = one != other
        if not apart.any():
            return parent
        first, second = first[apart], second[apart]
        np.minimum.at(parent, np.maximum(one[apart], other[apart]), np.minimum(one[apart], other[apart]))
        while True:  # let every label point at the root
            grand = parent[parent]
            if (grand == parent).all():
                break
            parent = grand


def _held_by_ties(ties: list[Tie]) -> list[Note]:
    """Keep channels whole that would have to leave together with positions that cannot be removed."""
    if not ties:
        return []
    first = np.concatenate([tie.first.numpy().reshape(-1) for tie in ties])
    second = np.concatenate([tie.second.numpy().reshape(-1) for tie in ties])
    half_fixed = np.flatnonzero((first == FIXED) != (second == FIXED))
    if not len(half_fixed):
        return []
    ends = np.cumsum([tie.first.numel() for tie in ties])
    notes = []
    for number in np.unique(np.searchsorted(ends, half_fixed, side="right")):
        tie = ties[number]
        fixed, other = tie.first == FIXED, tie.second == FIXED
        notes.append(Note(torch.cat([tie.first[other & ~fixed], tie.second[fixed & ~other]]), tie.module, tie.why))
    return notes


def _marked(count: int, marks: list[Labels]) -> np.ndarray:
    found = np.zeros(count, dtype=bool)
    for labels in marks:
        found[labels.numpy()] = True
    return found


def _not_masked_alone(slots: list[Slot], ties: list[Tie], produced: np.ndarray, read: np.ndarray) -> list[Note]:
    """Note what is read by a weight that also makes channels, or that is computed from more than one."""
    together = _components(len(read), [tie for tie in ties if tie.of_weights])
    found = _marked(len(read), [torch.from_numpy(together[read])])[together]
    found = (found & ~read) | (produced & read)
    found[FIXED] = False
    notes = []
    for slot in slots if found.any() else []:
        labels = slot.start + np.flatnonzero(found[slot.start : slot.start + slot.size])
        if len(labels):
            module = slot.tensor.rpartition(".")[0] or slot.tensor
            why = "reads channels by a weight that cannot be masked alone"
            notes.append(Note(torch.from_numpy(labels), module, why))
    return notes


def _reasons(component: np.ndarray, noted: list[Note]) -> np.ndarray:
    """Return, per component, the index of the first note about it, -1 for none."""
    reason = np.full(len(component), -1)
    for i in range(len(noted) - 1, -1, -1):
        reason[component[noted[i].labels.numpy()]] = i
    reason[component[FIXED]] = -1
    return reason


def _signatures(slots: list[Slot], component: np.ndarray, costs: list[CostTerm]) -> np.ndarray:
    """Return, per component, a hash of the slots and the axes of costs that it has positions in, and how many."""
    weight = np.zeros(len(component), dtype=np.uint64)
    random = np.random.default_rng(0)
    for slot, value in zip(slots, random.integers(1, 2**63, len(slots), dtype=np.uint64), strict=True):
        weight[slot.start : slot.start + slot.size] = value
    signature = np.zeros(len(component), dtype=np.uint64)
    np.add.at(signature, component, weight)
    axes = {id(labels): labels.numpy() for cost in costs for labels in cost.axes}
    for labels, value in zip(axes.values(), random.integers(1, 2**63, len(axes), dtype=np.uint64), strict=True):
        np.add.at(signature, component[labels], value)
    return signature


def couple(slots: list[Slot], record: Record) -> Coupling:
    """Form channel groups from what a forward pass showed.

    A channel is a component of tied labels in which some weight makes a channel. Channels form a group when they lie
    in the same slots, equally often, cost the same, and are held or free alike.

    Args:
        slots: The dimensions of all tensors, in ascending order of their labels.
        record: What the forward pass showed.
    """
    count = slots[-1].start + slots[-1].size if slots else 1
    record = replace(record, holds=[*_held_by_ties(record.ties), *record.holds])
    component = _components(count, record.ties)
    produced, read = _marked(count, record.produced), _marked(count, record.read)
    produced[FIXED] = False
    record.inexact = [*record.inexact, *_not_masked_alone(slots, record.ties, produced, read)]
    held, inexact = _reasons(component, record.holds), _reasons(component, record.inexact)
    signature = _signatures(slots, component, record.costs)

    makers = np.flatnonzero(produced)
    order = _forward_order(record.produced, count)
    makers = makers[np.argsort(order[makers], kind="stable")]
    channels, first = np.unique(component[makers], return_index=True)
    channels, first = channels[np.argsort(first)], np.sort(first)  # channels by where they are made first
    keys = np.stack([signature[channels], held[channels].astype(np.uint64)], axis=1)
    _, first_of_key, key = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first_of_key))  # groups in the order of the forward pass
    group_number = rank[key.reshape(-1)]

    channel_group = np.full(count, -1)
    channel_group[channels] = group_number
    number_within = np.zeros(count, dtype=np.int64)
    by_group = np.argsort(group_number, kind="stable")
    starts = np.searchsorted(group_number[by_group], np.arange(group_number.max() + 1 if len(channels) else 0))
    number_within[channels[by_group]] = np.arange(len(channels)) - starts[group_number[by_group]]

    label_group, label_channel = channel_group[component], number_within[component]
    coupling = _assemble(slots, record, component, label_group, label_channel, held, inexact, (produced, read))
    coupling.pairs = _pairs(count, record.ties)
    for axis in map(coupling.axis, record.squeezed):
        if axis.fixed == 0 and [per_channel for _, per_channel in axis.groups] == [1]:
            name = axis.groups[0][0]
            coupling.groups[name] = replace(coupling.groups[name], least=2)
    return coupling


def _pairs(count: int, ties: list[Tie]) -> np.ndarray:
    if not ties:
        return np.zeros(0, dtype=np.int64)
    first = np.concatenate([tie.first.numpy().reshape(-1) for tie in ties])
    second = np.concatenate([tie.second.numpy().reshape(-1) for tie in ties])
    apart = first != second
    return np.sort(first[apart] * count + second[apart])


def _forward_order(produced: list[Labels], count: int) -> np.ndarray:
    """Return when each label was made: (labels,)."""
    order = np.full(count, np.iinfo(np.int64).max)
    at = 0
    for labels in produced:
        where = labels.numpy()
        order[where] = np.minimum(order[where], at + np.arange(len(where)))
        at += len(where)
    return order


def _assemble(
    slots: list[Slot],
    record: Record,
    component: np.ndarray,
    label_group: np.ndarray,
    label_channel: np.ndarray,
    held: np.ndarray,
    inexact: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
) -> Coupling:
    """Collect the slices of every group, in order of tensors, and sort groups into free and held."""
    slot_of = np.repeat(np.arange(len(slots)), [slot.size for slot in slots])
    slot_of = np.concatenate([[0], slot_of])  # the label FIXED is in no slot
    labels = np.flatnonzero(label_group >= 0)
    place = label_group[labels] * len(slots) + slot_of[labels]
    within = place * (label_channel[labels].max(initial=0) + 1) + label_channel[labels]
    order = np.argsort(within, kind="stable")
    labels, place = labels[order], place[order]
    cuts = np.flatnonzero(place[1:] != place[:-1]) + 1
    parts: dict[int, list[tuple[Slot, np.ndarray]]] = {}
    for run in np.split(labels, cuts) if len(labels) else []:
        number, slot = label_group[run[0]], slots[slot_of[run[0]]]
        size = label_channel[run].max() + 1
        parts.setdefault(int(number), []).append((slot, run.reshape(size, -1)))

    groups: dict[str, Group] = {}
    whole: dict[str, Unprunable] = {}
    index_of_group = np.full(int(label_group.max(initial=-1)) + 2, -1)  # the last is for labels in none, numbered -1
    for number in sorted(parts):
        group, reason = _group(parts[number], record, component, held, inexact, sides)
        if reason:
            before = whole.get(group.name)
            whole[group.name] = Unprunable(
                group.size + (before.channels if before else 0), before.reason if before else reason
            )
        else:
            name = group.name if group.name not in groups else f"{group.name}#{number}"
            index_of_group[number] = len(groups)
            groups[name] = Group(name, *list(group.__dict__.values())[1:])
    return Coupling(groups, whole, component, index_of_group[label_group], label_channel)


def _group(
    parts: list[tuple[Slot, np.ndarray]],
    record: Record,
    component: np.ndarray,
    held: np.ndarray,
    inexact: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
) -> tuple[Group, str]:
    """Make one group from the labels it has in each slot; returns it with the reason why it is held, if it is."""
    produced, read = sides
    by_side: tuple[list[Slice], list[Slice], list[Slice]] = ([], [], [])
    for slot, labels in parts:
        side = 0 if produced[labels[0, 0]] else 1 if read[labels[0, 0]] else 2
        by_side[side].extend(_slices(slot, labels - slot.start))
    first = component[parts[0][1][0, 0]]
    name = by_side[0][0].tensor
    reason = str(record.holds[held[first]]) if held[first] >= 0 else ""
    size = len(parts[0][1])
    if size == 1 and not reason:
        reason = f"{name.rpartition('.')[0]}: all its channels can only leave together"
    why = str(record.inexact[inexact[first]]) if inexact[first] >= 0 else ""
    makers, readers, others = (tuple(side) for side in by_side)
    return Group(name.rpartition(".")[0] or name, size, makers, readers, others, why), reason


def _slices(slot: Slot, positions: np.ndarray) -> list[Slice]:
    """Write the positions of channels, (channels, positions of a channel), as slices with a regular step."""
    found = []
    size, width = positions.shape
    start = int(positions[0, 0])
    if width == 1 and np.array_equal(positions[:, 0], np.arange(start, start + size)):
        return [Slice(slot.tensor, slot.axis, start)]
    breaks = np.flatnonzero(np.diff(positions[0]) != 1) + 1
    for columns in np.split(positions, breaks, axis=1):
        step = int(columns[1, 0] - columns[0, 0]) if len(columns) > 1 else 1
        width = columns.shape[1]
        start = int(columns[0, 0])
        regular = start + np.arange(len(columns))[:, None] * step + np.arange(width)
        if step <= 0 or not np.array_equal(regular, columns):
            return [Slice(slot.tensor, slot.axis, table=tuple(tuple(map(int, row)) for row in positions))]
        found.append(Slice(slot.tensor, slot.axis, start, step, width))
    return found
