"""Counts: sizes that remember which channels they count, so that it shows where code shapes one tensor by another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_prune.graph.records import Labels, Record, Shaping

__all__ = [
    "CHECK", "AttributeNumber", "ChannelCount", "CountPower", "channels_counted", "counted_shape", "find_computed",
    "number_attributes",
]  # fmt: skip


CHECK = "check"  # what code does that compares a number of channels with an attribute


class ChannelCount(int):
    """A number of channels, a whole fraction of it, or a multiple of that, that remembers which they are.

    Attributes:
        labels: The channels.
        times: How many times the fraction it is.
        record: What the pass shows in which they were counted; one that code has kept from another pass tells nothing.

    Example:
        >>> shape = counted_shape(torch.Size([2, 8]), {1: torch.arange(8)}, Record())
        >>> batch, channels = shape
        >>> type(batch).__name__, type(channels).__name__, type(channels // 4).__name__, channels // 4
        ('int', 'ChannelCount', 'ChannelCount', 2)
    """

    labels: Labels
    record: Record
    times: int = 1

    def __mul__(self, other: Any) -> Any:
        result = int(self) * other
        if type(other) not in (int, AttributeNumber) or other < 1:
            return result
        self._note_computed(other)
        multiple = _count(
            result,
            self.labels,
            self.record,
        )
        multiple.times = self.times * other
        return multiple

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        result = super().__floordiv__(other)
        self._note_computed(other)
        if not isinstance(result, int) or self.times > 1:
            return result
        return _count(result, self.labels, self.record)

    def __eq__(self, other: Any) -> bool:
        result = int(self) == other
        if result and isinstance(other, AttributeNumber):
            check = Shaping(other.module, CHECK, (), {}, (other,), (self.labels,))
            self.record.shapings.append(check)
        return result

    def __ne__(self, other: Any) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def _note_computed(self, other: Any) -> None:
        if isinstance(other, AttributeNumber):
            self.record.computed_with.add((other.module, other.attribute))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        result = pow(int(self), other, modulo)
        if not isinstance(result, float):
            return result
        power = CountPower(result)
        power.count = self
        power.power = other
        return power


class CountPower(float):
    """A power of a number of channels, such as a root of it, that remembers which number.

    Attributes:
        count: The number of channels.
        power: The exponent.
    """

    count: ChannelCount
    power: float


class AttributeNumber(int):
    """A number that remembers which attribute of which module it is.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute; with that of an entry behind it, ``"sizes.1"``, where it is in a list.
    """

    module: str
    attribute: str

    def __mul__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, ChannelCount) else int(self) * other

    def __eq__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, ChannelCount) else int(self) == other

    def __ne__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, ChannelCount) else int(self) != other

    __hash__ = int.__hash__


def number_attributes(module: Any, name: str) -> None:
    """Let the whole numbers among the attributes of a module remember where they are from.

    Args:
        module: The module, which nobody else uses.
        name: Its name.
    """
    attributes = vars(module)
    for attribute, value in list(attributes.items()):
        if type(value) is int and value > 1:
            attributes[attribute] = _number(value, name, attribute)
        elif type(value) in (list, tuple) and value and all(type(entry) is int for entry in value):
            numbers = [
                _number(entry, name, f"{attribute}.{place}") if entry > 1 else entry
                for place, entry in enumerate(value)
            ]
            attributes[attribute] = type(value)(numbers)


def _number(value: int, module: str, attribute: str) -> AttributeNumber:
    number = AttributeNumber(value)
    number.module = module
    number.attribute = attribute
    return number


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
