"""The plan: which channels of each group are kept, always of the original model, as plain JSON."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMAT_VERSION", "PlannedGroup", "PruningPlan", "Slice", "plan_in_force", "record_plan", "width_in"]

FORMAT_VERSION = 1
_RECORD = "_pruning_plan"

Index = dict[str, dict[int, Tensor]]
"""(n,) int64 positions that are kept, by tensor name and axis, for the axes that get shorter."""

Shapes = dict[str, tuple[int, ...]]
"""Shape by tensor name."""


@dataclass(frozen=True)
class Slice:
    """Where the channels of a group lie along one axis of one tensor of the original model.

    Channel ``i`` occupies the positions ``start + i * step`` to ``start + i * step + width - 1``.

    Attributes:
        tensor: Dotted name of the parameter or buffer.
        axis: The axis.
        start: Position of the first channel.
        step: Distance from one channel to the next.
        width: Number of neighbouring positions that one channel occupies.
        table: The positions of each channel, where they follow no such rule; ``start`` to ``width`` are then unused.

    Example:
        >>> Slice("classifier.weight", axis=1, start=0, step=49, width=49).positions(torch.tensor([2]))[[0, -1]]
        tensor([ 98, 146])
    """

    tensor: str
    axis: int
    start: int = 0
    step: int = 1
    width: int = 1
    table: tuple[tuple[int, ...], ...] = ()

    def positions(self, channels: Tensor) -> Tensor:
        """Return the positions of some channels along the axis, channel by channel.

        Args:
            channels: (n,) int64 channel numbers of the original group.

        Returns:
            (n * positions of a channel,) int64.
        """
        if self.table:
            return torch.tensor(self.table)[channels].reshape(-1)
        starts = channels * self.step + self.start  # (n,)
        if self.width == 1:
            return starts
        neighbours = torch.arange(self.width)
        return (starts[:, None] + neighbours).reshape(-1)

    def to_json(self) -> list[Any]:
        """Return the slice as plain values, in the order of its attributes; the table only where there is one."""
        values: list[Any] = [self.tensor, self.axis, self.start, self.step, self.width]
        if self.table:
            values.append([list(positions) for positions in self.table])
        return values

    @classmethod
    def from_json(cls, values: Iterable[Any]) -> "Slice":
        """Make a slice from what `to_json` returned."""
        tensor, axis, start, step, width, *more = values
        table = more[0] if more else []
        return cls(
            tensor=tensor,
            axis=axis,
            start=start,
            step=step,
            width=width,
            table=tuple(tuple(positions) for positions in table),
        )


@dataclass(frozen=True)
class PlannedGroup:
    """What is kept of one channel group.

    Attributes:
        size: Number of channels in the original model.
        kept: The channels that are kept, ascending.
        slices: Where the channels lie.
    """

    size: int
    kept: tuple[int, ...]
    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        if not self._is_valid():
            raise ValueError(
                f"A group of {self.size} channels must keep at least one of them, ascending and without repetition; "
                f"got {list(self.kept)}."
            )

    def _is_valid(self) -> bool:
        if not self.kept or self.kept[0] < 0 or self.kept[-1] >= self.size:
            return False
        distances = self.channels.diff()
        return bool((distances > 0).all())

    @cached_property
    def channels(self) -> Tensor:
        """The channels that are kept, as (n,) int64."""
        return torch.tensor(self.kept, dtype=torch.int64)

    @cached_property
    def pruned(self) -> Tensor:
        """The channels that are pruned, as (n,) int64."""
        is_pruned = torch.ones(self.size, dtype=torch.bool)
        is_pruned[self.channels] = False
        return is_pruned.nonzero()[:, 0]

    @property
    def width(self) -> int:
        """How many positions one channel has in the first slice's axis: output channels of the group's first layer."""
        if not self.slices:
            return 1
        first = self.slices[0]
        return width_in(self.slices, first.tensor, first.axis)

    def to_json(self) -> dict[str, Any]:
        """Return the group as plain values."""
        return {
            "size": self.size,
            "kept": list(self.kept),
            "slices": [channel_slice.to_json() for channel_slice in self.slices],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PlannedGroup":
        """Make a group from what `to_json` returned."""
        slices = tuple(Slice.from_json(values) for values in content["slices"])
        return cls(content["size"], tuple(content["kept"]), slices)

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)


@dataclass(frozen=True)
class PruningPlan:
    """The channels that are kept, per group, always of the original model.

    A plan has all that is needed to prune a model of the original architecture without tracing it again.

    Attributes:
        groups: What is kept of each group, by group name. Groups that are absent keep all channels.
        shapes: Original shape of every tensor that the groups touch, by dotted name.
        budget: What was asked and reached, if the plan was made for a budget; see `lightning_prune.planning.Budget`.

    Example:
        >>> group = PlannedGroup(size=4, kept=(0, 2), slices=(Slice("conv.weight", 0), Slice("fc.weight", 1)))
        >>> plan = PruningPlan({"conv": group}, {"conv.weight": (4, 3, 3, 3), "fc.weight": (10, 4)})
        >>> plan.index()["fc.weight"]
        {1: tensor([0, 2])}
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    groups: dict[str, PlannedGroup] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    budget: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels that are kept, by group name."""
        return {name: len(group.kept) for name, group in self.groups.items()}

    @property
    def digest(self) -> str:
        """A hash of what is kept, equal on all ranks that agree."""
        content = {name: group.kept for name, group in sorted(self.groups.items())}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def index(self) -> Index:
        """Return the original positions that are kept, by tensor name and axis, for the axes that get shorter."""
        return {tensor: dict(axes) for tensor, axes in self._index.items()}

    @cached_property
    def _index(self) -> Index:
        index: Index = defaultdict(dict)
        is_kept: dict[tuple[str, int], Tensor] = {}  # (positions,) bool, of axes that several slices may share
        for group in self.groups.values():
            if len(group.kept) == group.size:
                continue
            for channel_slice in group.slices:
                tensor = channel_slice.tensor
                axis = channel_slice.axis
                axis_size = self.shapes[tensor][axis]
                if axis_size == group.size and not channel_slice.table:
                    # The positions are the channels. All such axes share one tensor, so that what others make of it is
                    # made once.
                    index[tensor][axis] = group.channels
                    continue
                if (tensor, axis) not in is_kept:
                    is_kept[tensor, axis] = torch.ones(axis_size, dtype=torch.bool)
                pruned_positions = channel_slice.positions(group.pruned)
                is_kept[tensor, axis][pruned_positions] = False
        for (tensor, axis), mask in is_kept.items():
            index[tensor][axis] = mask.nonzero()[:, 0]
        return index

    def pruned_shapes(self) -> Shapes:
        """Return the shape that each touched tensor has once the plan is applied."""
        return dict(self._pruned_shapes)

    @cached_property
    def _pruned_shapes(self) -> Shapes:
        shapes = dict(self.shapes)
        for tensor, axes in self._index.items():
            shape = list(shapes[tensor])
            for axis, kept in axes.items():
                shape[axis] = kept.shape[0]
            shapes[tensor] = tuple(shape)
        return shapes

    def after(self, earlier: "PruningPlan | None") -> "PruningPlan":
        """Return this plan joined with one that has been applied before.

        Args:
            earlier: The plan in force, about the same original model; None for none.

        Raises:
            ValueError: If this plan keeps a channel that the earlier one has pruned.
        """
        if earlier is None or not earlier.groups:
            return self
        for name, planned in self.groups.items():
            if name in earlier.groups:
                _check_follows(name, planned, earlier.groups[name])
        groups = {**earlier.groups, **self.groups}
        shapes = {**earlier.shapes, **self.shapes}
        return replace(self, groups=groups, shapes=shapes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values: dictionaries, lists, strings, numbers."""
        return {
            "version": FORMAT_VERSION,
            "groups": {name: group.to_json() for name, group in self.groups.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "budget": self.budget,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PruningPlan":
        """Make a plan from what `to_json` returned.

        Raises:
            ValueError: If the content is no plan, or of a newer format.
        """
        version = content.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"The plan has format version {version!r}, this lightning-prune reads up to {FORMAT_VERSION}; "
                "install a newer lightning-prune."
            )
        return cls(
            groups={name: PlannedGroup.from_json(group) for name, group in content["groups"].items()},
            shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
            budget=content.get("budget"),
        )

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)


def plan_in_force(model: nn.Module) -> PruningPlan | None:
    """Return the plan that has been applied to a model, or None for a model that was never pruned."""
    return model.__dict__.get(_RECORD)


def record_plan(model: nn.Module, plan: PruningPlan | None) -> None:
    """Note on the model which plan has been applied to it; the note travels with copies and pickles of the model."""
    model.__dict__[_RECORD] = plan


def _check_follows(name: str, planned: PlannedGroup, earlier: PlannedGroup) -> None:
    """Raise a ValueError unless what is planned of a group can be reached from what an earlier plan has kept."""
    if earlier.size != planned.size or earlier.slices != planned.slices:
        raise ValueError(
            f"Group {name!r} of this plan and of the plan in force are not the same channels; trace the model again "
            "and make a new plan."
        )
    returning = sorted(set(planned.kept) - set(earlier.kept))
    if returning:
        raise ValueError(
            f"The plan keeps channels {returning[:5]} of group {name!r}, which have been pruned already; plans are "
            "about the original model, and what is pruned cannot come back."
        )


def _without_cache(record: Any) -> dict[str, Any]:
    """Return the fields of a record, without what can be worked out from them again."""
    return {name: record.__dict__[name] for name in record.__dataclass_fields__}


def width_in(slices: Iterable[Slice], tensor: str, axis: int) -> int:
    """Return how many positions along an axis of a tensor one channel has in some slices.

    Args:
        slices: The slices.
        tensor: Name of the tensor.
        axis: The axis.

    Example:
        >>> width_in([Slice("weight", 0, width=2), Slice("weight", 0, start=8, width=2)], "weight", 0)
        4
    """
    width = 0
    for one in slices:
        if (one.tensor, one.axis) == (tensor, axis):
            width += len(one.table[0]) if one.table else one.width
    return width
