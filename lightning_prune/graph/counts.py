"""Counts: sizes that remember which channels they count, so that it shows where code shapes one tensor by another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_prune.graph.records import Labels, Record

__all__ = ["ChannelCount", "channels_counted", "counted_shape", "find_computed"]


class ChannelCount(int):
    """A number of channels, or a whole fraction of it, that remembers which they are.

    Attributes:
        labels: The channels.
        record: What the pass shows in which they were counted; one that code has kept from another pass tells nothing.

    Example:
        >>> shape = counted_shape(torch.Size([2, 8]), {1: torch.arange(8)}, Record())
        >>> batch, channels = shape
        >>> type(batch).__name__, type(channels).__name__, type(channels // 4).__name__, channels // 4
        ('int', 'ChannelCount', 'ChannelCount', 2)
    """

    labels: Labels
    record: Record

    def __floordiv__(self, other: Any) -> Any:
        result = super().__floordiv__(other)
        if not isinstance(result, int):
            return result
        return _count(result, self.labels, self.record)


def _count(number: int, labels: Labels, record: Record) -> ChannelCount:
    count = ChannelCount(number)
    count.labels = labels
    count.record = record
    return count


def counted_shape(shape: Sequence[int], labels_by_axis: Mapping[int, Labels], record: Record) -> torch.Size:
    """Return the shape of a tensor, with counts along the axes that have labels."""
    sizes = list(shape)
    for axis, labels in labels_by_axis.items():
        sizes[axis] = _count(sizes[axis], labels, record)
    return torch.Size(sizes)


def channels_counted(size: int, record: Record) -> Labels | None:
    """Return the channels that a size counts, if it does and has been counted in the same pass."""
    if isinstance(size, ChannelCount) and size.record is record:
        return size.labels
    return None


def find_computed(sizes: Sequence[int], record: Record) -> int | None:
    """Find the one size, of those that an axis is split into, that becomes smaller with the number of channels.

    It counts channels or, where none does, is the one that is left to PyTorch.

    Args:
        sizes: The sizes as they were written, -1 for the one that is left out; nothing where that is not known.
        record: What the pass shows.
    """
    counts = []
    left_out = []
    for place, size in enumerate(sizes):
        if channels_counted(size, record) is not None:
            counts.append(place)
        if size == -1:
            left_out.append(place)
    computed = counts or left_out
    return computed[0] if len(computed) == 1 else None
