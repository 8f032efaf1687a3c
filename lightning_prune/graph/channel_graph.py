"""The channel graph: which channels of a model leave together, which may not leave, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PlannedGroup, PruningPlan, Slice, plan_in_force

__all__ = ["Axis", "ChannelGraph", "Group", "Term", "Unprunable"]


@dataclass(frozen=True)
class Group:
    """Channels that are coupled: one channel is one slice of every tensor named here.

    Attributes:
        name: Name of the module that makes the channels first.
        size: Number of channels in the original model.
        out_slices: Where weights produce the channels (rows of a convolution, say).
        in_slices: Where weights consume the channels (columns of the layers behind, say).
        other_slices: What else is stored per channel: biases, normalisation.
        not_mask_exact: Why pruning a channel is not the same as masking it; empty if it is the same.
        least: How many must stay: two where an axis of one would be squeezed away.
    """

    name: str
    size: int
    out_slices: tuple[Slice, ...]
    in_slices: tuple[Slice, ...]
    other_slices: tuple[Slice, ...]
    not_mask_exact: str = ""
    least: int = 1

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of a channel."""
        return self.out_slices + self.other_slices + self.in_slices

    @property
    def width(self) -> int:
        """How many output channels of its first layer one channel of the group stands for."""
        first = self.out_slices[0]
        alike = [part for part in self.out_slices if (part.tensor, part.axis) == (first.tensor, first.axis)]
        return sum(len(part.table[0]) if part.table else part.width for part in alike)


@dataclass(frozen=True)
class Unprunable:
    """Channels that stay whole.

    Attributes:
        channels: How many.
        reason: Which module keeps them, and why.
    """

    channels: int
    reason: str


@dataclass(frozen=True)
class Axis:
    """The length of an axis: a fixed number of positions and, for each group, some per channel."""

    fixed: int
    groups: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Term:
    """A cost: a coefficient times the lengths of some axes, spent by a module."""

    coefficient: float
    axes: tuple[Axis, ...]
    module: str


@dataclass
class ChannelGraph:
    """Which channels of a model leave together, which may not, and why; always about the original model.

    The graph stays valid when the model is pruned: criteria read the tensors as they are now and number the channels
    as they were at first.

    Attributes:
        model: The model that was traced.
        groups: The groups that can lose channels, in the order of the forward pass, by name.
        unprunable: The channels that cannot be pruned, by the name of the module that makes them, with the reason.
        shapes: Original shape of every parameter and buffer.
        terms: What the model costs, by metric ("flops", "params", "channels"; "latency" once it has been measured), as
            sums of products of axis lengths.
        module: Dotted name of the part that was traced; empty for the whole model.
        example_inputs: What it was traced with.
    """

    model: nn.Module
    groups: dict[str, Group]
    unprunable: dict[str, Unprunable]
    shapes: dict[str, tuple[int, ...]]
    terms: dict[str, list[Term]] = field(repr=False)
    module: str = ""
    example_inputs: Any = field(default=None, repr=False)

    def plan(self, kept: Mapping[str, Tensor]) -> PruningPlan:
        """Make a plan from the channels that stay.

        Args:
            kept: (n,) int64 channels that stay, by group name; groups that are absent stay whole.

        Raises:
            ValueError: If a name is no group of this graph, or a group would lose its last channel.
        """
        planned = {}
        for name, channels in kept.items():
            group = self.group(name)
            planned[name] = PlannedGroup(group.size, tuple(sorted(channels.tolist())), group.slices)
        shapes = {part.tensor: self.shapes[part.tensor] for group in planned.values() for part in group.slices}
        return PruningPlan(planned, shapes)

    def group(self, name: str) -> Group:
        """Return a group by name.

        Raises:
            ValueError: If there is no such group; says whether its channels are held, and why.
        """
        if name in self.groups:
            return self.groups[name]
        if name in self.unprunable:
            raise ValueError(f"The channels of {name!r} stay whole: {self.unprunable[name].reason}.")
        raise ValueError(f"{name!r} is no channel group of this model; the groups are {', '.join(self.groups)}.")

    def kept(self, name: str) -> Tensor:
        """Return the channels of a group that the model still has, as (n,) int64."""
        plan = plan_in_force(self.model)
        if plan is None or name not in plan.groups:
            return torch.arange(self.groups[name].size)
        return plan.groups[name].channels

    def positions_now(self, part: Slice, channels: Tensor) -> Tensor:
        """Return where channels lie in a tensor as the model has it now, channel by channel.

        Args:
            part: A slice of a group.
            channels: (n,) int64 channels of that group which the model still has.

        Returns:
            (n * positions of a channel,) int64.
        """
        positions = part.positions(channels)
        plan = plan_in_force(self.model)
        index = plan.index().get(part.tensor, {}).get(part.axis) if plan is not None else None
        return positions if index is None else torch.searchsorted(index, positions)

    def rows(self, name: str, part: Slice, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return what one slice holds of each channel that the model still has.

        Args:
            name: The group.
            part: One of its slices.
            values: Tensors to read instead of the model's own, by the same names and of the same shapes.

        Returns:
            (live channels, values per channel), on the device of the tensor.
        """
        tensor = (values if values is not None else named_tensors(self.model))[part.tensor].detach()
        channels = self.kept(name)
        # Most often the axis holds the channels of this group and nothing else, in order.
        alone = not part.table and part.step == part.width and channels.shape[0] * part.width == tensor.shape[part.axis]
        if not alone:
            tensor = tensor.index_select(part.axis, self.positions_now(part, channels).to(tensor.device))
        return tensor.movedim(part.axis, 0).reshape(channels.shape[0], -1)

    def explain(self, name: str) -> str:
        """Say in words what becomes of the channels of a module.

        Args:
            name: Name of a group, of a module that is part of one, or of held channels.
        """
        if name in self.unprunable and name not in self.groups:
            held = self.unprunable[name]
            return f"{name}: {held.channels} channels stay whole, because {held.reason}"
        for group in self.groups.values():
            members = {part.tensor.rpartition(".")[0]: None for part in group.slices}
            if name == group.name or name in members:
                how = f"not exactly, because {group.not_mask_exact}" if group.not_mask_exact else "exactly"
                others = ", ".join(member for member in members if member != name)
                return f"{name}: group {group.name!r} of {group.size} channels, removable {how}; shared with {others}"
        raise ValueError(f"{name!r} makes or reads no channels; the groups are {', '.join(self.groups)}.")
