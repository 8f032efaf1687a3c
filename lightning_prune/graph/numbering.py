"""Numbering of labels: the group, and the channel in it, that each label belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from lightning_prune.graph.records import FIXED, CostTerm, Labels, Record
from lightning_prune.graph.slots import SlotTable

__all__ = ["Numbering", "number_labels"]

_NONE = -1  # the number of no group and of no channel
_ODD = np.uint64(0x9E3779B97F4A7C15)  # multiples of it are spread over all numbers
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Numbering:
    """The group of each label and the channel of that group: (labels,) int64 each, -1 where it is in none."""

    group: ndarray
    channel: ndarray


def number_labels(table: SlotTable, component_of: ndarray, record: Record, reason_of: ndarray) -> Numbering:
    """Sort channels into groups, and number both in the order in which the forward pass first produces them.

    Args:
        table: The labels of all tensors.
        component_of: (labels,) the component of each label.
        record: What the forward pass showed.
        reason_of: (labels,) by component, the number of the reason why it cannot be pruned, -1 for none.
    """
    channels = _channels(component_of, record.out_slices)
    likeness = _likeness(table, component_of, record.costs)
    group_of_channel = _number_groups(likeness[channels], reason_of[channels])
    return _number_labels(component_of, channels, group_of_channel)


def _channels(component_of: ndarray, out_slices: Sequence[Labels]) -> ndarray:
    """Return the components that are channels, in the order in which they are first produced: (channels,)."""
    when = np.full(len(component_of), _NEVER)  # by component, its first place among all that the pass produced
    clock = 0
    for labels in out_slices:
        produced = component_of[labels.numpy()]
        now = clock + np.arange(len(produced))
        np.minimum.at(when, produced, now)
        clock += len(produced)
    when[component_of[FIXED]] = _NEVER
    channels = np.flatnonzero(when < _NEVER)
    return channels[np.argsort(when[channels])]


def _number_groups(likeness: ndarray, reason: ndarray) -> ndarray:
    """Return the group of each channel, numbered in the order in which their first channels come: (channels,).

    Args:
        likeness: (channels,) a hash that is equal for channels that lie and cost alike.
        reason: (channels,) the number of the note that makes each unprunable, -1 for none.
    """
    keys = likeness + reason.astype(np.uint64) * _ODD  # one number is sorted many times faster than pairs
    _, first_channel, key_of_channel = np.unique(keys, return_index=True, return_inverse=True)
    keys_in_order = np.argsort(first_channel)
    group_of_key = np.argsort(keys_in_order)
    return group_of_key[key_of_channel]


def _number_labels(component_of: ndarray, channels: ndarray, group_of_channel: ndarray) -> Numbering:
    """Return the group, and the channel in it, of each label.

    Args:
        component_of: (labels,) the component of each label.
        channels: (channels,) the components that are channels.
        group_of_channel: (channels,) the group of each.
    """
    count = len(component_of)
    group_of_component = np.full(count, _NONE)
    group_of_component[channels] = group_of_channel

    by_group = np.argsort(group_of_channel, kind="stable")
    sorted_groups = group_of_channel[by_group]
    group_starts = np.searchsorted(sorted_groups, sorted_groups)  # where the group of each channel starts
    number_in_component = np.full(count, _NONE)
    number_in_component[channels[by_group]] = np.arange(len(channels)) - group_starts
    return Numbering(group_of_component[component_of], number_in_component[component_of])


def _likeness(table: SlotTable, component_of: ndarray, costs: Sequence[CostTerm]) -> ndarray:
    """Return a hash of where each component has labels, how often, and which costs depend on it.

    Every slot and every axis of a cost has a random number; a component's hash is the sum over its labels.

    Returns:
        (labels,) uint64 by component.
    """
    random = np.random.default_rng(0)
    likeness = np.zeros(table.count, dtype=np.uint64)

    numbers_of_slots = _random_numbers(random, len(table.slots))
    number_of_label = np.zeros(table.count, dtype=np.uint64)
    number_of_label[FIXED + 1 :] = np.repeat(numbers_of_slots, table.sizes)
    np.add.at(likeness, component_of, number_of_label)

    axes = _distinct_axes(costs)
    numbers_of_axes = _random_numbers(random, len(axes))
    for labels, number in zip(axes, numbers_of_axes, strict=True):
        components_on_axis = component_of[labels.numpy()]
        np.add.at(likeness, components_on_axis, number)
    return likeness


def _random_numbers(random: np.random.Generator, count: int) -> ndarray:
    return random.integers(1, 2**63, count, dtype=np.uint64)


def _distinct_axes(costs: Sequence[CostTerm]) -> list[Labels]:
    """Return the labels along the axes of some costs, each once where several costs share the very same."""
    by_identity = {}
    for cost in costs:
        for labels in cost.axes:
            if not isinstance(labels, int):
                by_identity[id(labels)] = labels
    return list(by_identity.values())
