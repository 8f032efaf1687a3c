"""The plan: which channels of each group are kept, always of the original model, as plain JSON."""

import hashlib
import json
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from operator import lt
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_prune.plain import MisfitError, made

__all__ = [
    "FORMAT_VERSION",
    "Absence",
    "Adaptation",
    "Count",
    "Index",
    "PlannedGroup",
    "PruningPlan",
    "Shares",
    "Site",
    "Size",
    "Slice",
    "are_crossed",
    "plan_in_force",
    "record_plan",
    "renamed",
    "width_in",
]

FORMAT_VERSION = 1
_RECORD = "_pruning_plan"
_INSIDE = ".a.b"  # behind the name of a module: where a tensor of a layer in it would be
_LONGEST_AXIS = 2**28  # beyond all tensors that there are; a list of its positions is still no burden
_REMEDY = "make it anew with `lightning_prune.plan` or `ChannelGraph.plan`"

Index = dict[str, dict[int, Tensor]]
"""(n,) int64 positions that are kept, by tensor name and axis, for the axes that get shorter."""

Shapes = dict[str, tuple[int, ...]]
"""Shape by tensor name."""


# -- what follows channels beside tensors ------------------------------------------------------------------------------

Shares = Mapping[str, Fraction]
"""How much of the channels of each group is kept, by name; of groups that are absent all are."""


@dataclass(frozen=True)
class Count:
    """A number that counts channels of groups, or multiples of them.

    Attributes:
        original: What it is in the original model.
        groups: Names of the groups; it is in proportion with the channels of each.
        times: It is so many times a number that code has divided with a remainder left out.

    Example:
        >>> Count(768, ("attn#heads", "attn")).now({"attn#heads": Fraction(1, 2), "attn": Fraction(3, 4)})
        288
    """

    original: int
    groups: tuple[str, ...] = ()
    times: int = 1

    def now(self, shares: Shares) -> int:
        """Return what the number is when a share of the channels is kept."""
        number = Fraction(self.original, self.times)
        for group in self.groups:
            number *= shares.get(group, 1)
        return int(number) * self.times


THE_REST = Count(-1)


@dataclass(frozen=True)
class Size:
    """A size that code gives to a function, and the one that fits the channels.

    Attributes:
        place: Which of the sizes it is.
        asked: What the code says.
        fitting: What has to be said instead; `THE_REST` for what the other pieces leave of an axis.
    """

    place: int
    asked: Count
    fitting: Count


@dataclass(frozen=True)
class Site:
    """A place where a module shapes a tensor, or scales attention by the width of heads.

    Attributes:
        function: ``"shape"`` for sizes along all axes, ``"split"`` for those of pieces of one axis, ``"scale"`` for
            attention that is scaled by the root of what it is given, ``"factor"`` for a power of a size that a tensor
            is multiplied or divided by.
        axes: How many axes the tensor has that is given.
        given: Lengths of some of these axes: (axis, length).
        sizes: How many sizes the code gives.
        changed: Those of them that are in proportion with channels.
        power: Which power of its size a factor is.
    """

    function: str
    axes: int
    given: tuple[tuple[int, Count], ...]
    sizes: int = 0
    changed: tuple[Size, ...] = ()
    power: float = 1.0

    def counts(self) -> Iterator[Count]:
        """Yield the numbers that follow channels."""
        for _, count in self.given:
            yield count
        for size in self.changed:
            yield size.asked
            yield size.fitting


@dataclass(frozen=True)
class Absence:
    """What a module returns once the residual block that it is in has been pruned: zeros.

    Attributes:
        block: Name of the group that is the block.
        outputs: The lengths of the axes of each tensor that it returns, None where an axis is as long as that of the
            first tensor that it is given; None for an output that is None itself.
        is_single: Whether it returns a tensor, and no tuple.
    """

    block: str
    outputs: tuple[tuple[Count | None, ...] | None, ...]
    is_single: bool = True

    def counts(self) -> Iterator[Count]:
        """Yield the numbers that follow channels."""
        for axes in self.outputs:
            for count in axes or ():
                if count is not None:
                    yield count


@dataclass(frozen=True)
class Adaptation:
    """What has to be adapted in a module when channels of groups are pruned.

    Attributes:
        numbers: Attributes of it that count channels; of a list or tuple one entry, ``"sizes.1"``.
        sites: Places where its code computes with other numbers, which are replaced as it runs.
        absence: What it returns once the block that it is in has been pruned; None if it is in none.
    """

    numbers: tuple[tuple[str, Count], ...] = ()
    sites: tuple[Site, ...] = ()
    absence: Absence | None = None

    def groups(self) -> set[str]:
        """Return the names of the groups that it follows."""
        found: set[str] = set()
        for count in self._counts():
            found.update(count.groups)
        if self.absence is not None:
            found.add(self.absence.block)
        return found

    def _counts(self) -> Iterator[Count]:
        for _, count in self.numbers:
            yield count
        for site in self.sites:
            yield from site.counts()
        if self.absence is not None:
            yield from self.absence.counts()

    def after(self, earlier: "Adaptation | None") -> "Adaptation":
        """Return this joined with what had to be adapted before, perhaps in a block that nobody asks about any more.

        Args:
            earlier: What belongs to the plan in force; None for nothing.
        """
        if earlier is None or self.absence is not None:
            return self
        return replace(self, absence=earlier.absence)

    def renamed(self, rename: Callable[[str], str]) -> "Adaptation":
        """Return it with other names of groups.

        Args:
            rename: Gives the new name of a group.
        """

        def of_count(count: Count) -> Count:
            return replace(count, groups=tuple(map(rename, count.groups)))

        def of_size(size: Size) -> Size:
            return replace(size, asked=of_count(size.asked), fitting=of_count(size.fitting))

        numbers = tuple((name, of_count(count)) for name, count in self.numbers)
        sites = []
        for site in self.sites:
            given = tuple((axis, of_count(count)) for axis, count in site.given)
            changed = tuple(map(of_size, site.changed))
            sites.append(replace(site, given=given, changed=changed))
        absence = self.absence
        if absence is not None:
            outputs = []
            for axes in absence.outputs:
                renamed_axes = [None if count is None else of_count(count) for count in axes or ()]
                outputs.append(None if axes is None else tuple(renamed_axes))
            absence = replace(absence, block=rename(absence.block), outputs=tuple(outputs))
        return Adaptation(numbers, tuple(sites), absence)


# -- the plan ----------------------------------------------------------------------------------------------------------


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

    def __post_init__(self) -> None:
        wrong = self._wrong_numbers()
        if not isinstance(self.tensor, str) or wrong or not self._has_regular_table():
            raise ValueError(
                f"The plan is damaged: {', '.join(wrong) or 'the table'} of a slice of {self.tensor!r} cannot be; "
                f"{_REMEDY}."
            )

    def _wrong_numbers(self) -> list[str]:
        """Return the names of the attributes that are no such numbers as they have to be."""
        numbers = self.axis, self.start, self.step, self.width
        if _are_counts(numbers) and self.step and self.width:
            return []
        least = {"axis": 0, "start": 0, "step": 1, "width": 1}
        return [name for name, number in least.items() if not _is_count(getattr(self, name), number)]

    def _has_regular_table(self) -> bool:
        """Tell whether the table, if there is one, has as many positions for each channel, and each of them once."""
        if self.table == ():  # the most frequent case
            return True
        if not isinstance(self.table, tuple) or not all(isinstance(row, tuple) for row in self.table):
            return False
        listed = [position for row in self.table for position in row]
        widths = {len(row) for row in self.table}
        return len(widths) <= 1 and 0 not in widths and _are_counts(listed) and len(set(listed)) == len(listed)

    @cached_property
    def _table_end(self) -> int:
        return 1 + max(position for row in self.table for position in row)

    def fits(self, channels: int, axis_size: int) -> bool:
        """Tell whether a number of channels lie along an axis of some length, each at positions of its own.

        Args:
            channels: Number of channels of the group.
            axis_size: Length of the axis.
        """
        if self.table:
            return len(self.table) == channels and self._table_end <= axis_size
        apart = self.step >= self.width or channels == 1
        return apart and self.start + (channels - 1) * self.step + self.width <= axis_size

    def count(self, channels: int) -> int:
        """Return the number of positions that a number of channels take."""
        return channels * (len(self.table[0]) if self.table else self.width)

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

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)


@dataclass(frozen=True)
class PlannedGroup:
    """What is kept of one channel group.

    Attributes:
        size: Number of channels in the original model.
        kept: The channels that are kept, ascending.
        slices: Where the channels lie.
        least: How many have to be kept: 0 of a residual block, which is a group of one channel, else 1.
    """

    size: int
    kept: tuple[int, ...]
    slices: tuple[Slice, ...]
    least: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.kept, list):
            object.__setattr__(self, "kept", tuple(self.kept))
        if not _is_count(self.size, 1) or self.size > _LONGEST_AXIS:
            raise ValueError(f"The plan is damaged: a group cannot have {self.size!r} channels; {_REMEDY}.")
        if not self._keeps_some():
            raise ValueError(
                f"A group of {self.size} channels must keep at least one of them, ascending and without repetition; "
                f"got {_shown(self.kept)}."
            )
        if not isinstance(self.slices, tuple) or not all(isinstance(one, Slice) for one in self.slices):
            raise ValueError(f"The plan is damaged: the slices of a group must be a tuple of Slice; {_REMEDY}.")

    def _keeps_some(self) -> bool:
        if not isinstance(self.kept, tuple) or not set(map(type, self.kept)) <= {int}:
            return False
        if not self.kept:
            return self.least == 0
        first, last = self.kept[0], self.kept[-1]
        if first < 0 or last >= self.size:
            return False
        return all(map(lt, self.kept, self.kept[1:]))

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

    def positions_at(self, place: tuple[str, int]) -> Tensor:
        """Return where all channels lie along an axis of a tensor, given by both: (channels, positions of each)."""
        every = torch.arange(self.size)
        found = [one.positions(every).view(self.size, -1) for one in self.slices if (one.tensor, one.axis) == place]
        return torch.cat(found, dim=1) if found else every.new_zeros(self.size, 0)

    @property
    def width(self) -> int:
        """How many positions one channel has in the first slice's axis: output channels of the group's first layer."""
        if not self.slices or not self.least:
            return 1
        first = self.slices[0]
        return width_in(self.slices, first.tensor, first.axis)

    def to_json(self) -> dict[str, Any]:
        """Return the group as plain values."""
        content: dict[str, Any] = {
            "size": self.size,
            "kept": list(self.kept),
            "slices": [channel_slice.to_json() for channel_slice in self.slices],
        }
        if self.least != 1:
            content["least"] = self.least
        return content

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
        adaptations: What follows the groups in modules beside their tensors, by the names of these.

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
    adaptations: dict[str, Adaptation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts: dict[str, Any] = {"groups": self.groups, "shapes": self.shapes, "budget": self.budget or {}}
        for name, content in parts.items():
            if not isinstance(content, dict):
                raise ValueError(f"The plan is damaged: {name} must be a dictionary; {_REMEDY}.")
        for name, group in self.groups.items():
            if not isinstance(group, PlannedGroup):
                raise ValueError(f"The plan is damaged: group {name!r} is no PlannedGroup; {_REMEDY}.")
        tensors = {one.tensor for group in self.groups.values() for one in group.slices}
        for tensor in tensors:
            self._check_shape(tensor)
        self._check_places()

    def _check_shape(self, tensor: str) -> None:
        """Raise a ValueError unless a tensor has a shape."""
        shape = self.shapes.get(tensor)
        if not isinstance(shape, tuple) or not _are_counts(shape) or max(shape, default=0) > _LONGEST_AXIS:
            raise ValueError(f"The plan is damaged: the shape of {tensor!r} in it is {_shown(shape)}; {_REMEDY}.")

    def _check_places(self) -> None:
        """Raise a ValueError unless the slices lie within their tensors, with room for all of a group along an axis."""
        taken: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)  # by tensor and axis, and by group
        for name, group in self.groups.items():
            for one in group.slices:
                place = one.tensor, one.axis
                if not one.fits(group.size, self._length(place)):
                    raise self._misfit(name, place)
                taken[place][name] = taken[place].get(name, 0) + one.count(group.size)
        for place, by_group in taken.items():
            if sum(by_group.values()) > self._length(place):
                self._check_crossing(place, list(by_group))

    def _length(self, place: tuple[str, int]) -> int:
        """Return the length of an axis, 0 where there is none."""
        tensor, axis = place
        shape = self.shapes[tensor]
        return shape[axis] if axis < len(shape) else 0

    def _misfit(self, name: str, place: tuple[str, int]) -> ValueError:
        tensor, axis = place
        return ValueError(
            f"The plan is damaged: the channels of group {name!r} do not fit along axis {axis} of {tensor!r}, which "
            f"has shape {tuple(self.shapes[tensor])}; {_REMEDY}."
        )

    def _check_crossing(self, place: tuple[str, int], names: Sequence[str]) -> None:
        """Raise a ValueError unless channels of each group meet those of others equally often there, as heads do."""
        before: list[Tensor] = []
        for name in names:
            own = self.groups[name].positions_at(place)
            is_there_once = len(own.unique()) == own.numel()
            if not is_there_once or not all(are_crossed(own, other) for other in before):
                raise self._misfit(name, place)
            before.append(own)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels that are kept, by group name."""
        return {name: len(group.kept) for name, group in self.groups.items()}

    @property
    def shares(self) -> dict[str, Fraction]:
        """How much of the channels of each group is kept, by name."""
        return {name: Fraction(len(group.kept), group.size) for name, group in self.groups.items()}

    @property
    def digest(self) -> str:
        """A hash of what is kept, equal on all ranks that agree."""
        content = {name: group.kept for name, group in sorted(self.groups.items())}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def index(self) -> Index:
        """Return the original positions that are kept, by tensor name and axis, for the axes that get shorter."""
        return {tensor: dict(axes) for tensor, axes in self._index.items()}

    def kept_along(self, tensor: str) -> dict[int, Tensor]:
        """Return the original positions of one tensor that are kept, by axis, for the axes that get shorter."""
        return dict(self._index.get(tensor, {}))

    @cached_property
    def _index(self) -> Index:
        index: Index = defaultdict(dict)
        is_kept: dict[tuple[str, int], Tensor] = {}  # (positions,) bool, of axes that several slices may share
        pruned = [group for group in self.groups.values() if len(group.kept) < group.size]
        slices = Counter((one.tensor, one.axis) for group in pruned for one in group.slices)
        for group in pruned:
            for channel_slice in group.slices:
                tensor = channel_slice.tensor
                axis = channel_slice.axis
                axis_size = self.shapes[tensor][axis]
                is_alone = slices[tensor, axis] == 1
                if is_alone and axis_size == group.size and not channel_slice.table:
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

    @cached_property
    def emptied(self) -> frozenset[str]:
        """The tensors that have nothing left, which are those of residual blocks that are pruned, by name."""
        return frozenset(name for name, shape in self._pruned_shapes.items() if 0 in shape)

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
        adaptations = dict(earlier.adaptations)
        for name, adaptation in self.adaptations.items():
            adaptations[name] = adaptation.after(earlier.adaptations.get(name))
        return replace(self, groups=groups, shapes=shapes, adaptations=adaptations)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values: dictionaries, lists, strings, numbers."""
        content: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "groups": {name: group.to_json() for name, group in self.groups.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "budget": self.budget,
        }
        if self.adaptations:
            content["adaptations"] = {name: asdict(one) for name, one in self.adaptations.items()}
        return content

    @classmethod
    def from_json(cls, content: Any) -> "PruningPlan":
        """Make a plan from what `to_json` returned.

        Raises:
            ValueError: If the content is no plan, or of a newer format.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"A plan is a mapping with groups and shapes; got a {type(content).__name__}.")
        version: Any = content.get("version")
        if not _is_count(version, 1):
            raise ValueError(f"The plan is damaged: its format version is {version!r}; {_REMEDY}.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The plan has format version {version!r}, this lightning-prune reads up to {FORMAT_VERSION}; "
                "install a newer lightning-prune."
            )
        try:
            return made(cls, {name: value for name, value in content.items() if name != "version"})
        except MisfitError as wrong:
            raise ValueError(f"The plan is damaged: {wrong}; {_REMEDY}.") from wrong

    def __getstate__(self) -> dict[str, Any]:
        return _without_cache(self)


# -- the plan in force -------------------------------------------------------------------------------------------------


def plan_in_force(model: nn.Module) -> PruningPlan | None:
    """Return the plan that has been applied to a model or to networks in it, or None if none of them was ever pruned.

    Args:
        model: The model. The plan has the names that it has for its tensors, whatever they were called when they were
            pruned.
    """
    records = _records(model)
    if not records:
        return None
    if list(records) == [""]:
        return records[""]
    joined = _JOINED.get(model)
    if joined is None or not joined.is_of(records):
        joined = _Joined(records, _join(model, records))
        _JOINED[model] = joined
    return joined.plan


def record_plan(model: nn.Module, plan: PruningPlan | None) -> None:
    """Note which plan has been applied to a model, on each network in it that was pruned.

    A network is the least submodule with all layers of groups that share layers. The note travels with it: into other
    models, with copies and with pickles.

    Args:
        model: The model.
        plan: What is in force from now on; None for nothing.
    """
    for module in model.modules():
        vars(module).pop(_RECORD, None)
    for network, record in _by_network(plan).items():
        vars(model.get_submodule(network))[_RECORD] = record


@dataclass(frozen=True)
class _Joined:
    """The plan of a model with pruned networks in it.

    Attributes:
        records: The plans of the networks, by name.
        plan: What they are together, under the names of the model.
    """

    records: Mapping[str, PruningPlan]
    plan: PruningPlan

    def is_of(self, records: Mapping[str, PruningPlan]) -> bool:
        """Tell whether the plan is made of these very records."""
        if self.records.keys() != records.keys():
            return False
        return all(self.records[name] is record for name, record in records.items())


_JOINED: WeakKeyDictionary[nn.Module, _Joined] = WeakKeyDictionary()  # joining takes longer than looking up


def _records(model: nn.Module) -> dict[str, PruningPlan]:
    """Return the plans noted on a model and its submodules, by name."""
    records: dict[str, PruningPlan] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        seen.add(id(module))
        record = module.__dict__.get(_RECORD)
        if record is not None:
            records[prefix.removesuffix(".")] = record
        if not module._modules:
            return
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return records


def _join(model: nn.Module, records: Mapping[str, PruningPlan]) -> PruningPlan:
    """Join the plans of networks in a model, under the names that it has for their modules and tensors."""
    first_names = _FirstNames(model)
    groups: dict[str, PlannedGroup] = {}
    shapes: Shapes = {}
    adaptations: dict[str, Adaptation] = {}
    for network, record in records.items():
        prefix = f"{network}." if network else ""
        first_name = partial(first_names, prefix)
        plan = renamed(record, first_name, first_name)
        groups.update(plan.groups)
        shapes.update(plan.shapes)
        adaptations.update(plan.adaptations)
    first, *others = [record.budget for record in records.values()]
    agreed = all(budget == first for budget in others)
    return PruningPlan(groups, shapes, first if agreed else None, adaptations)


class _FirstNames:
    """The first of several names that a module or tensor of a model may have: by that one plans know it.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        named = *model.named_modules(), *model.named_parameters(), *model.named_buffers()
        self._first = {id(value): name for name, value in named}
        every = *model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False)
        self._known = dict([*every, *model.named_buffers(remove_duplicate=False)])

    def __call__(self, prefix: str, name: str) -> str:
        """Return the first name of what has a name behind a prefix; groups may have a number behind their module's."""
        name = prefix + name if name else prefix.removesuffix(".")
        known, number, digits = name.partition("#")
        if known not in self._known:
            return name
        return self._first[id(self._known[known])] + number + digits


def _by_network(plan: PruningPlan | None) -> dict[str, PruningPlan]:
    """Divide a plan into what is about each network, under the names that this has for its tensors."""
    if plan is None:
        return {}
    records: dict[str, PruningPlan] = {}
    for groups in _connected(plan):
        shapes = {one.tensor: plan.shapes[one.tensor] for group in groups.values() for one in group.slices}
        adaptations = {name: one for name, one in plan.adaptations.items() if one.groups() & groups.keys()}
        followed = {name.partition("#")[0] for one in adaptations.values() for name in one.groups()}
        network = _least_module([*shapes, *(f"{name}{_INSIDE}" for name in [*adaptations, *followed])])
        record = plan  # of one network most often
        parts = (groups, plan.groups), (shapes, plan.shapes), (adaptations, plan.adaptations)
        if any(len(part) < len(whole) for part, whole in parts):
            record = replace(plan, groups=groups, shapes=shapes, adaptations=adaptations)
        if network:
            within = partial(_within, network)
            record = renamed(record, within, within)
        records[network] = record.after(records.get(network))
    return records


def _within(network: str, name: str) -> str:
    """Return the name that a module or tensor has within a network, which has none itself."""
    return "" if name == network else name.removeprefix(network + ".")


def _connected(plan: PruningPlan) -> list[dict[str, PlannedGroup]]:
    """Divide the groups of a plan into those that share tensors or adapt the same module, or do so with others."""
    leader_of: dict[str, str] = {}  # by tensor: another one that is in the same part, itself for one of each part

    def leader(tensor: str) -> str:
        while leader_of[tensor] != tensor:
            leader_of[tensor] = leader_of[leader_of[tensor]]
            tensor = leader_of[tensor]
        return tensor

    for group in plan.groups.values():
        for one in group.slices:
            leader_of.setdefault(one.tensor, one.tensor)
            leader_of[leader(one.tensor)] = leader(group.slices[0].tensor)
    for adaptation in plan.adaptations.values():
        tensors = [plan.groups[name].slices[0].tensor for name in adaptation.groups() if name in plan.groups]
        for tensor in tensors[1:]:
            leader_of[leader(tensor)] = leader(tensors[0])
    parts: dict[str, dict[str, PlannedGroup]] = {}
    for name, group in plan.groups.items():
        key = leader(group.slices[0].tensor) if group.slices else ""
        parts.setdefault(key, {})[name] = group
    return list(parts.values()) or [{}]


def _least_module(tensors: Iterable[str]) -> str:
    """Name the least module that contains the modules which some tensors belong to; it is none of these itself."""
    paths = [name.split(".")[:-2] for name in tensors]
    shared = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def renamed(plan: PruningPlan, rename: Callable[[str], str], rename_group: Callable[[str], str]) -> PruningPlan:
    """Return a plan with other names.

    Args:
        plan: The plan.
        rename: Gives the new name of a tensor.
        rename_group: Gives the new name of a group, which is that of a module, perhaps with a number behind it.
    """
    groups = {}
    for name, group in plan.groups.items():
        slices = [replace(one, tensor=rename(one.tensor)) for one in group.slices]
        groups[rename_group(name)] = replace(group, slices=tuple(slices))
    shapes = {rename(name): shape for name, shape in plan.shapes.items()}
    adaptations = {rename_group(name): one.renamed(rename_group) for name, one in plan.adaptations.items()}
    return replace(plan, groups=groups, shapes=shapes, adaptations=adaptations)


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


def are_crossed(first: Tensor, second: Tensor) -> bool:
    """Tell whether each channel of a group has as many positions in common with each of another.

    Args:
        first: (channels, positions of each) where those of the group lie along an axis.
        second: (channels, positions of each) where those of the other one do.

    Example:
        >>> heads, widths = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 2], [1, 3]])
        >>> are_crossed(heads, widths), are_crossed(heads, heads)
        (True, False)
    """
    if not first.numel() or not second.numel():
        return True
    channel_of = torch.full((1 + int(max(first.max(), second.max())),), -1)
    channel_of[second] = torch.arange(len(second))[:, None]
    met = channel_of[first]  # (channels, positions of each), -1 where the other group is not
    pairs = met + len(second) * torch.arange(len(first))[:, None]
    counts = torch.bincount(pairs[met >= 0], minlength=len(first) * len(second))
    return bool((counts == counts[0]).all())


def _is_count(number: Any, least: int = 0) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _are_counts(numbers: Sequence[Any]) -> bool:
    """Tell whether all of some numbers are whole and not negative, which are many."""
    return set(map(type, numbers)) <= {int} and min(numbers, default=0) >= 0


def _shown(numbers: Any) -> str:
    """Return what stands in the place of some numbers, in few words."""
    in_short = reprlib.Repr()
    in_short.maxlist = 10
    return in_short.repr(list(numbers) if isinstance(numbers, tuple) else numbers)


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
