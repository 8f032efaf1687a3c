"""Channel graph: which channels of a model can only be pruned together, which cannot be pruned, and why."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import Adaptation, PlannedGroup, PruningPlan, Slice, plan_in_force, width_in

__all__ = ["Axis", "ChannelGraph", "Group", "Snapshot", "Term", "Unprunable", "values_of"]


@dataclass(frozen=True)
class Group:
    """Channels that can only be pruned together: one channel is a slice of every tensor named here.

    Attributes:
        name: Name of the module that produces the channels first.
        size: Number of channels in the original model.
        out_slices: Where weights produce the channels (rows of a convolution, say).
        in_slices: Where weights consume the channels (columns of the layers behind, say). Queries are consumed by the
            keys that they are multiplied by, and these by them: of such channels all that produces them is among these.
        other_slices: What else is stored per channel: biases, normalisation.
        not_mask_exact: Why pruning a channel is not the same as masking it; empty if it is the same.
        least: How many must be kept: two where an axis of one would be squeezed away, or has no statistics; more than
            are behind the projection of an LSTM.
        kind: What one channel is: one of "channels", "heads", "query-key", "value", "stream" and "blocks"; a residual
            block is a group of one channel, of which none need be kept.
    """

    name: str
    size: int
    out_slices: tuple[Slice, ...]
    in_slices: tuple[Slice, ...]
    other_slices: tuple[Slice, ...]
    not_mask_exact: str = ""
    least: int = 1
    kind: str = "channels"

    @property
    def mask_exact(self) -> bool:
        """Whether pruning a channel is the same as masking it."""
        return not self.not_mask_exact

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of a channel."""
        every = self.out_slices + self.other_slices + self.in_slices
        return tuple(dict.fromkeys(every))

    def without(self, tensors: Collection[str]) -> "Group":
        """Return the group without its slices in some tensors, given by name."""
        if not tensors:
            return self
        left = []
        for slices in (self.out_slices, self.in_slices, self.other_slices):
            elsewhere = [one for one in slices if one.tensor not in tensors]
            left.append(tuple(elsewhere))
        out_slices, in_slices, other_slices = left
        return replace(
            self,
            out_slices=out_slices,
            in_slices=in_slices,
            other_slices=other_slices,
        )

    @property
    def consuming(self) -> tuple[Slice, ...]:
        """Where weights consume the channels, without those that produce them too, as of queries and keys."""
        producing = {*self.out_slices, *self.other_slices}
        return tuple(one for one in self.in_slices if one not in producing)

    @property
    def width(self) -> int:
        """How many output channels of its first layer one channel of the group stands for; 1 of a residual block."""
        if not self.least:
            return 1
        first = self.out_slices[0]
        return width_in(self.out_slices, first.tensor, first.axis)

    @property
    def channels(self) -> int:
        """How many output channels of its first layer the group stands for: its size, if each is one of them."""
        return self.size * self.width

    @property
    def modules(self) -> list[str]:
        """Names of the modules that the slices are in, each once."""
        return _modules(self.slices)


def _modules(slices: Iterable[Slice]) -> list[str]:
    """Return the names of the modules that slices are in, each once."""
    names = (one.tensor.rpartition(".")[0] for one in slices)
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Unprunable:
    """Channels of a layer that cannot be pruned.

    Attributes:
        channels: How many; channels that several layers produce together count for each.
        reason: Which module is the reason, and why.
    """

    channels: int
    reason: str


@dataclass(frozen=True)
class Axis:
    """The length of an axis, or what it comes to where kernels work in blocks.

    Attributes:
        fixed: Positions that belong to no group.
        groups: For each group, its name and the positions of one channel.
        multiple: What the length is rounded up to a multiple of.
        unfilled: Size of blocks: the axis counts only if the channels of some group do not fill theirs; 0 if it always
            does.
    """

    fixed: int
    groups: tuple[tuple[str, int], ...]
    multiple: int = 1
    unfilled: int = 0


@dataclass(frozen=True)
class Term:
    """A cost: a coefficient times the lengths of some axes, spent by a module."""

    coefficient: float
    axes: tuple[Axis, ...]
    module: str

    @property
    def groups(self) -> set[str]:
        """The names of the groups that it depends on."""
        return {name for axis in self.axes for name, _ in axis.groups}


@dataclass(frozen=True)
class Snapshot:
    """What a model has at a moment: worked out once for all groups, valid until it is pruned or its tensors change.

    Attributes:
        groups: The groups of its graph, by name.
        tensors: Its parameters and buffers, or what is read instead of them, by name.
        plan: The plan in force, with no groups if there is none.
    """

    groups: Mapping[str, Group]
    tensors: Mapping[str, Tensor]
    plan: PruningPlan

    def kept(self, name: str) -> Tensor:
        """Return the channels of a group that the model still has; see `ChannelGraph.kept`."""
        if self.plan.emptied and all(one.tensor in self.plan.emptied for one in self.groups[name].out_slices):
            return torch.arange(0)  # pruned with a residual block, whatever is planned for them
        if name not in self.plan.groups:
            return torch.arange(self.groups[name].size)
        return self.plan.groups[name].channels

    def positions(self, of_group: Slice, channels: Tensor) -> Tensor:
        """Return where channels lie in a tensor; see `ChannelGraph.positions_now`."""
        if of_group.tensor in self.plan.emptied:
            return torch.arange(0)
        positions = of_group.positions(channels)
        kept_by_axis = self.plan.kept_along(of_group.tensor)
        if of_group.axis not in kept_by_axis:
            return positions
        kept = kept_by_axis[of_group.axis]
        places = torch.searchsorted(kept, positions)
        is_left = kept[places.clamp(max=len(kept) - 1)] == positions  # of a head, what all heads have kept of its width
        return places[is_left]

    def rows(self, name: str, of_group: Slice) -> Tensor:
        """Return what one slice has of each channel that the model still has; see `ChannelGraph.rows`."""
        tensor = values_of(self.tensors, of_group.tensor)
        channels = self.kept(name)
        if of_group.tensor in self.plan.emptied:
            return tensor.new_zeros(len(channels), 0)
        if not self._fills_axis(name, of_group, len(channels), tensor):
            positions = self.positions(of_group, channels)
            tensor = tensor.index_select(of_group.axis, positions.to(tensor.device))
        channels_first = tensor.movedim(of_group.axis, 0)  # (kept channels * positions of a channel, other axes ...)
        return channels_first.reshape(len(channels), -1)

    def _fills_axis(self, name: str, of_group: Slice, channels: int, tensor: Tensor) -> bool:
        """Tell whether an axis has some channels of a group and nothing else, in order, which is most often so."""
        if of_group.table or of_group.step != of_group.width:
            return False
        size = tensor.shape[of_group.axis]
        original = self.plan.shapes[of_group.tensor][of_group.axis] if of_group.tensor in self.plan.shapes else size
        return of_group.count(self.groups[name].size) == original and channels * of_group.width == size


@dataclass
class ChannelGraph:
    """Which channels of a model can only be pruned together, which cannot, and why; about the original model.

    The graph is valid after the model is pruned too: criteria read the tensors as they are now and number the channels
    as they were at first.

    Attributes:
        model: The model that was traced.
        groups: The groups that can be pruned, in the order of the forward pass, by name.
        unprunable: The channels that cannot, by the name of the module that produces them, with the reason.
        shapes: Original shape of every parameter and buffer.
        terms: What the model costs, by metric ("flops", "params", "channels"; "latency" once it has been measured), as
            sums of products of axis lengths.
        module: Dotted name of the submodule that was traced; empty for the model itself.
        example_inputs: What it was traced with.
        untraced: Why steps could not be traced, by name.
        frozen: FLOPs of the frozen submodules that keep their channels, by name; they are part of no cost.
        adaptations: What follows the groups in modules beside their tensors, by the names of these.
        blocks: The modules that are pruned with each residual block, by the name of its group.
        whole: The graph that this one has only some groups of; None for one that has all.
    """

    model: nn.Module
    groups: dict[str, Group]
    unprunable: dict[str, Unprunable]
    shapes: dict[str, tuple[int, ...]]
    terms: dict[str, list[Term]] = field(repr=False)
    module: str = ""
    example_inputs: Any = field(default=None, repr=False)
    untraced: Mapping[str, str] = field(default_factory=dict, repr=False)
    frozen: Mapping[str, float] = field(default_factory=dict, repr=False)
    adaptations: Mapping[str, Adaptation] = field(default_factory=dict, repr=False)
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    whole: "ChannelGraph | None" = field(default=None, repr=False)

    def channels(self) -> "ChannelGraph":
        """Return the graph of channels alone, in which residual blocks are no groups, for those who score them.

        What has been pruned with blocks is not in it; the plans that it makes are of this graph.
        """
        plan = plan_in_force(self.model) or PruningPlan()
        if not self.blocks and not plan.emptied:
            return self
        groups = {}
        for name, group in self.groups.items():
            there = group.without(plan.emptied)
            if name not in self.blocks and there.out_slices:
                groups[name] = there
        shares = plan.shares
        pruned = {name for name in self.blocks if not shares.get(name, 1)}
        terms = {}
        for metric, of_metric in self.terms.items():
            there_too = []
            for term in of_metric:
                block = self.block_of(term.module)
                if term.groups <= groups.keys() and block not in pruned:
                    there_too.append(term)
            terms[metric] = there_too
        return replace(
            self,
            groups=groups,
            blocks={},
            terms=terms,
            whole=self,
        )

    def axes_of(self, term: Term) -> tuple[Axis, ...]:
        """Return the axes of a cost, with one of length 0 once the residual block that it belongs to has been pruned.

        Args:
            term: A term of the cost.
        """
        block = self.block_of(term.module)
        if not block:
            return term.axes
        there = Axis(0, ((block, 1),))
        return *term.axes, there

    def block_of(self, module: str) -> str:
        """Return the name of the residual block that a module is pruned with, empty for none.

        Args:
            module: Dotted name of the module.
        """
        inside = f"{module}."
        for block, modules in self.blocks.items():
            for name in modules:
                if inside.startswith(f"{name}."):
                    return block
        return ""

    def plan(self, kept: Mapping[str, Tensor]) -> PruningPlan:
        """Make a plan from the channels that are kept.

        Args:
            kept: (n,) int64 channels, by group name; of groups that are absent all are kept.

        Raises:
            ValueError: If a name is no group of this graph, or fewer channels of a group are kept than it must have.
        """
        if self.whole is not None:
            return self.whole.plan(kept)
        planned = {}
        for name, channels in kept.items():
            group = self.group(name)
            ascending = sorted(channels.tolist())
            if 0 < len(ascending) < group.least:
                raise ValueError(f"{name!r} has to keep {group.least} channels at least, not {len(ascending)}.")
            if not ascending and group.least and not len(self.kept(name)):
                continue  # pruned with a residual block
            planned[name] = PlannedGroup(group.size, tuple(ascending), group.slices, min(group.least, 1))
        adaptations = {name: one for name, one in self.adaptations.items() if one.groups() & planned.keys()}
        return PruningPlan(planned, self._shapes_of(planned.values()), adaptations=adaptations)

    def _shapes_of(self, groups: Iterable[PlannedGroup]) -> dict[str, tuple[int, ...]]:
        """Return the original shapes of the tensors that some groups have slices in."""
        shapes = {}
        for group in groups:
            for one in group.slices:
                shapes[one.tensor] = self.shapes[one.tensor]
        return shapes

    def group(self, name: str) -> Group:
        """Return a group by name.

        Args:
            name: Name of the group.

        Raises:
            ValueError: If there is no such group; says whether its channels are unprunable, and why.
        """
        if name in self.groups:
            return self.groups[name]
        if name in self.unprunable:
            reason = self.unprunable[name].reason
            raise ValueError(f"The channels of {name!r} cannot be pruned: {reason}.")
        known = ", ".join(self.groups)
        raise ValueError(f"{name!r} is no channel group of this model; the groups are {known}.")

    def kept(self, name: str) -> Tensor:
        """Return the channels of a group that the model still has, as (n,) int64.

        Args:
            name: Name of the group.
        """
        return self.snapshot({}).kept(name)

    def positions_now(self, of_group: Slice, channels: Tensor) -> Tensor:
        """Return where channels lie in a tensor as the model has it now, channel by channel.

        Args:
            of_group: A slice of a group.
            channels: (n,) int64 channels of that group which the model still has.

        Returns:
            (n * positions of a channel,) int64.
        """
        return self.snapshot({}).positions(of_group, channels)

    def rows(self, name: str, of_group: Slice, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return what one slice has of each channel that the model still has.

        Args:
            name: Name of the group.
            of_group: One of its slices.
            values: Tensors to read instead of the model's own, by the same names and of the same shapes.

        Returns:
            (kept channels, values per channel), on the device of the tensor.

        Raises:
            ValueError: If the tensor has no data.
        """
        return self.snapshot(values).rows(name, of_group)

    def snapshot(self, values: Mapping[str, Tensor] | None = None) -> Snapshot:
        """Return what the model has now, for those who ask about many groups: each question walks the model otherwise.

        Args:
            values: Tensors to read instead of the model's own, by the same names and of the same shapes.

        Raises:
            ValueError: If the model's own tensors are read, and the graph is stale.
        """
        plan = plan_in_force(self.model) or PruningPlan()
        if values is None:
            values = self._checked_tensors(plan)
        return Snapshot(self.groups, values, plan)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the model as they are now, by name.

        Raises:
            ValueError: If the graph is stale: a tensor of its groups is not what is left of the one that was traced.
        """
        return self._checked_tensors(plan_in_force(self.model) or PruningPlan())

    def _checked_tensors(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Return the parameters and buffers, after a look at those of groups; the plan is the one in force."""
        tensors = named_tensors(self.model)
        now = plan.pruned_shapes()
        for group in self.groups.values():
            for one in group.slices:
                expected = now.get(one.tensor, self.shapes[one.tensor])
                found = tensors.get(one.tensor)
                if found is None or tuple(found.shape) != expected:
                    raise ValueError(_stale(one.tensor, found, expected))
        return tensors

    def explain(self, name: str) -> str:
        """Say in words what becomes of the channels that a module produces or, if there are none, of those it stores.

        There is a line for each group, and for each reason why channels cannot be pruned.

        Args:
            name: Name of a group, of a module that a group has slices in, or of unprunable channels.

        Raises:
            ValueError: If the module has no channels that the graph knows of.
        """
        producing = [
            group for group in self.groups.values() if name == group.name or name in _modules(group.out_slices)
        ]
        told = [f"{name}: {_description(group, name)}" for group in producing]
        for entry, unprunable in self.unprunable.items():
            if name == entry or name == entry.partition("#")[0]:
                told.append(f"{name}: {unprunable.channels} channels cannot be pruned, because {unprunable.reason}")
        if told:
            return "\n".join(told)
        for group in self.groups.values():
            if name in group.modules:
                return f"{name}: {_description(group, name)}"
        known = ", ".join(self.groups)
        raise ValueError(f"{name!r} neither produces nor consumes channels; the groups are {known}.")


def values_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor by name, detached.

    Args:
        tensors: The tensors.
        name: Name of one of them.

    Raises:
        ValueError: If it has no data.

    Example:
        >>> values_of({"weight": torch.zeros(2, device="meta")}, "weight")
        Traceback (most recent call last):
        ValueError: 'weight' is on the meta device and has no values; load the weights of the model first.
    """
    tensor = tensors[name].detach()
    if tensor.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values; load the weights of the model first.")
    return tensor


def _stale(name: str, found: Tensor | None, expected: tuple[int, ...]) -> str:
    change = "is not in the model any more"
    if found is not None:
        change = f"has shape {tuple(found.shape)} now, where pruning has left {expected}"
    return f"The graph is stale: {name!r} {change}; trace the model again."


def _description(group: Group, module: str) -> str:
    exactness = "is the same as masking"
    if not group.mask_exact:
        exactness = f"is not masking, because {group.not_mask_exact}"
    others = ", ".join(other for other in group.modules if other != module)
    return f"group {group.name!r} of {group.size} channels, whose pruning {exactness}; shared with {others}"
