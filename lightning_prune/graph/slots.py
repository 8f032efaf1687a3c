"""Slots: the labels that the positions of all tensors of a model start with."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch

from lightning_prune.graph.records import FIXED, Labels

__all__ = ["Slot", "SlotTable", "module_of"]


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

    @property
    def stop(self) -> int:
        """The first label behind."""
        return self.start + self.size


def module_of(tensor: str) -> str:
    """Name the module that a tensor belongs to, or the tensor itself where that is the model's own."""
    return tensor.rpartition(".")[0] or tensor


class SlotTable:
    """All slots of a model, in ascending order of labels.

    An axis of a single position has none: what is on it cannot be pruned.

    Args:
        shapes: The tensors, by name and shape.

    Attributes:
        slots: The slots.
        sizes: Their sizes.
        by_tensor: The labels of all tensors, by name and axis.
        count: Number of labels, with `FIXED`, which is in no slot.

    Example:
        >>> table = SlotTable([("weight", (2, 3)), ("bias", (2,))])
        >>> for slot in table.slots:
        ...     print(slot)
        Slot(tensor='weight', axis=0, start=1, size=2)
        Slot(tensor='weight', axis=1, start=3, size=3)
        Slot(tensor='bias', axis=0, start=6, size=2)
        >>> table.labels("weight")
        {0: tensor([1, 2]), 1: tensor([3, 4, 5])}
        >>> table.count
        8
    """

    def __init__(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        self.slots = list(_number(shapes))
        self.sizes = [slot.size for slot in self.slots]
        self.count = 1 + sum(self.sizes)
        self.by_tensor: dict[str, dict[int, Labels]] = {}
        _, *labels_by_slot = torch.arange(self.count).split([1, *self.sizes])  # sooner than one at a time
        for slot, labels in zip(self.slots, labels_by_slot, strict=True):
            by_axis = self.by_tensor.setdefault(slot.tensor, {})
            by_axis[slot.axis] = labels

    def labels(self, tensor: str) -> dict[int, Labels]:
        """Return the labels of a tensor, by axis."""
        return self.by_tensor.get(tensor, {})

    def module_of(self, labels: Labels) -> str:
        """Name the module that the last of some labels belongs to."""
        last = int(labels.max())
        number = bisect_right(self.slots, last, key=attrgetter("stop"))
        slot = self.slots[number]
        return module_of(slot.tensor)


def _number(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[Slot]:
    label = FIXED + 1
    for name, shape in shapes:
        for axis, size in enumerate(shape):
            if size > 1:
                yield Slot(name, axis, label, size)
                label += size
