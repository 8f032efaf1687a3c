"""The plan format: which channels of each group stay, always against the original model, as plain JSON."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMAT_VERSION", "PlannedGroup", "PruningPlan", "Slice", "plan_in_force", "record_plan"]

FORMAT_VERSION = 1
_RECORD = "_pruning_plan"


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
        if self.width == 1:
            return channels * self.step + self.start
        return (self.start + channels[:, None] * self.step + torch.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class PlannedGroup:
    """What stays of one channel group.

    Attributes:
        size: Number of channels in the original model.
        kept: The channels that stay, ascending.
        slices: Where the channels lie.
    """

    size: int
    kept: tuple[int, ...]
    slices: tuple[Slice, ...]

    def __post_init__(self) -> None:
        kept = self.channels
        if not self.kept or kept[0] < 0 or kept[-1] >= self.size or not bool((kept.diff() > 0).all()):
            raise ValueError(
                f"A group of {self.size} channels must keep at least one of them, ascending and without repetition; "
                f"got {list(self.kept)}."
            )

    @cached_property
    def channels(self) -> Tensor:
        """The channels that stay, as (n,) int64."""
        return torch.tensor(self.kept, dtype=torch.int64)

    @cached_property
    def pruned(self) -> Tensor:
        """The channels that are pruned, as (n,) int64."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[self.channels] = False
        return mask.nonzero()[:, 0]

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)


@dataclass(frozen=True)
class PruningPlan:
    """The channels that stay, per group, always against the original model.

    A plan holds all that is needed to prune a model of the original architecture without tracing it again.

    Attributes:
        groups: What stays of each group, by group name. Groups that are absent stay whole.
        shapes: Original shape of every tensor that the groups touch, by dotted name.
        budget: What was asked and reached, if the plan was made for a budget; see `lightning_prune.pruning_plan`.

    Example:
        >>> group = PlannedGroup(size=4, kept=(0, 2), slices=(Slice("conv.weight", 0), Slice("fc.weight", 1)))
        >>> plan = PruningPlan({"conv": group}, {"conv.weight": (4, 3, 3, 3), "fc.weight": (10, 4)})
        >>> plan.index()["fc.weight"]
        {1: tensor([0, 2])}
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    groups: dict[str, PlannedGroup] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    budget: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels that stay, by group name."""
        return {name: len(group.kept) for name, group in self.groups.items()}

    @property
    def digest(self) -> str:
        """A hash of what is kept, equal on all ranks that agree."""
        content = {name: group.kept for name, group in sorted(self.groups.items())}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def index(self) -> dict[str, dict[int, Tensor]]:
        """Return the original positions that stay, by tensor name and axis, for the axes that get shorter."""
        return {tensor: dict(axes) for tensor, axes in self._index.items()}

    @cached_property
    def _index(self) -> dict[str, dict[int, Tensor]]:
        found: dict[str, dict[int, Tensor]] = {}
        shared: dict[tuple[str, int], Tensor] = {}  # axes that are more than the channels of one group
        for group in self.groups.values():
            if len(group.kept) == group.size:
                continue
            for part in group.slices:
                size = self.shapes[part.tensor][part.axis]
                axes = found.setdefault(part.tensor, {})
                if size == group.size and not part.table:
                    axes[part.axis] = group.channels  # one object for all such axes, so that what follows is done once
                    continue
                if (part.tensor, part.axis) not in shared:
                    shared[part.tensor, part.axis] = torch.ones(size, dtype=torch.bool)
                    axes[part.axis] = group.channels  # keeps the place
                shared[part.tensor, part.axis][part.positions(group.pruned)] = False
        for (tensor, axis), mask in shared.items():
            found[tensor][axis] = mask.nonzero()[:, 0]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)

    def pruned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape that each touched tensor has once the plan is applied."""
        return dict(self._pruned_shapes)

    @cached_property
    def _pruned_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self.shapes)
        for tensor, axes in self._index.items():
            shape = list(shapes[tensor])
            for axis, stays in axes.items():
                shape[axis] = stays.shape[0]
            shapes[tensor] = tuple(shape)
        return shapes

    def after(self, earlier: "PruningPlan | None") -> "PruningPlan":
        """Return this plan joined with one that has been applied before.

        Args:
            earlier: The plan in force, about the same original model; None for none.

        Raises:
            ValueError: If this plan keeps a channel that the earlier one has removed.
        """
        if earlier is None:
            return self
        for name, group in self.groups.items():
            before = earlier.groups.get(name)
            if before is None:
                continue
            if before.size != group.size or before.slices != group.slices:
                raise ValueError(
                    f"Group {name!r} of this plan and of the plan in force are not the same channels; trace the model "
                    "again and make a new plan."
                )
            returning = sorted(set(group.kept) - set(before.kept))
            if returning:
                raise ValueError(
                    f"The plan keeps channels {returning[:5]} of group {name!r}, which have been removed already; "
                    "plans are about the original model, and what is removed stays removed."
                )
        return replace(self, groups={**earlier.groups, **self.groups}, shapes={**earlier.shapes, **self.shapes})

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values: dictionaries, lists, strings, numbers."""
        return {
            "version": FORMAT_VERSION,
            "groups": {
                name: {
                    "size": group.size,
                    "kept": list(group.kept),
                    "slices": [_slice_to_json(part) for part in group.slices],
                }
                for name, group in self.groups.items()
            },
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
            {
                name: PlannedGroup(group["size"], tuple(group["kept"]), tuple(map(_slice_from_json, group["slices"])))
                for name, group in content["groups"].items()
            },
            {name: tuple(shape) for name, shape in content["shapes"].items()},
            content.get("budget"),
        )


def plan_in_force(model: nn.Module) -> PruningPlan | None:
    """Return the plan that has been applied to a model, or None for a model that was never pruned."""
    return model.__dict__.get(_RECORD)


def record_plan(model: nn.Module, plan: PruningPlan | None) -> None:
    """Note on the model which plan has been applied to it; the note travels with copies and pickles of the model."""
    model.__dict__[_RECORD] = plan


def _without_cache(record: Any) -> dict[str, Any]:
    """Return the fields of a record, without what can be worked out from them again."""
    return {name: record.__dict__[name] for name in record.__dataclass_fields__}


def _slice_to_json(part: Slice) -> list[Any]:
    values: list[Any] = [part.tensor, part.axis, part.start, part.step, part.width]
    return [*values, [list(row) for row in part.table]] if part.table else values


def _slice_from_json(values: Iterable[Any]) -> Slice:
    tensor, axis, start, step, width, *table = values
    return Slice(tensor, axis, start, step, width, tuple(map(tuple, table[0])) if table else ())
