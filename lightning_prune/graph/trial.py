"""Trial: a run of a network in which some groups have fewer channels, past modules that fail."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.comparison import KeptLabels, covers, first_shift
from lightning_prune.graph.frames import SourceLine, raising_line, running_line
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.operators import Operator, OperatorTables, TracerRule
from lightning_prune.graph.records import Call, CallKey, Known, Labels, ModuleCall, Record
from lightning_prune.graph.run import Forward
from lightning_prune.graph.sheets import is_pair
from lightning_prune.graph.tracer import Tracer
from lightning_prune.pruning_plan import Adaptation, Index, PlannedGroup, PruningPlan

__all__ = ["Entries", "Failure", "Fitted", "Place", "Pruned", "Shrinking", "Trial", "TrialRunner", "unlike_subsets"]


_NOWHERE = SourceLine()


class Pruned(Enum):
    """Which half of the channels of a group is pruned."""

    FIRST = "the first channels"
    LAST = "the last channels"
    SPREAD = "some channels everywhere"


@dataclass(frozen=True)
class Shrinking:
    """How a network is made smaller.

    Attributes:
        groups: Numbers of the groups that about half of the channels of are pruned.
        pruned: Which half.
        training: The mode to run in.
    """

    groups: Sequence[int]
    pruned: Pruned
    training: bool


def unlike_subsets(groups: Sequence[int]) -> list[list[int]]:
    """Return subsets such that all groups are in equally many of them, and no two in the same.

    Example:
        >>> unlike_subsets(range(6))
        [[0, 1, 2], [0, 3, 4], [1, 3, 5], [2, 4, 5]]
        >>> unlike_subsets([0])
        []
    """
    if len(groups) < 2:
        return []
    count = 2
    while math.comb(count, count // 2) < len(groups):
        count += 1
    subsets: list[list[int]] = [[] for _ in range(count)]
    memberships = itertools.combinations(subsets, count // 2)
    for group, subsets_of_group in zip(groups, memberships, strict=False):
        for subset in subsets_of_group:
            subset.append(group)
    return subsets


def _kept_channels(number: int, group: Group, pruned: Pruned) -> Tensor:
    """Return the channels that the group of some number keeps, as many at least as it must."""
    kept = _about_half(number, group.size, pruned)
    if len(kept) >= group.least:
        return kept
    channels = torch.arange(group.size)
    return channels[-group.least :] if pruned is Pruned.FIRST else channels[: group.least]


def _about_half(number: int, size: int, pruned: Pruned) -> Tensor:
    channels = torch.arange(size)
    if pruned is Pruned.FIRST:
        return channels[size // 2 :]
    if pruned is Pruned.LAST:
        return channels[: (size + 1) // 2]
    if size == 3:
        return channels[1:]
    # Not everywhere the same share: groups that must not be mistaken for each other become unlike.
    if number % 2 == 0 or size < 4:
        return channels[1::2]
    return channels[channels % 3 != 1]


@dataclass(frozen=True)
class Failure:
    """A module that failed.

    Attributes:
        key: The call of the module.
        line: The innermost line of somebody's code that raised; known when the trial has ended.
        given: The labels that the operator which failed was given, if an operator did.
        last_output: The labels of the output of the last operator.
        module_inputs: The labels that the module was given.
        at: Length of the operator trace when it failed.
        resumed: Length of the operator trace of the full network when the module has ended.
        ties: Number of ties before.
        unprunable: Number of notes on unprunable channels before.
    """

    key: CallKey
    line: SourceLine
    given: list[Labels]
    last_output: list[Labels]
    module_inputs: list[Labels]
    at: int
    resumed: int
    ties: int
    unprunable: int


class Entries(Enum):
    """A list of a record."""

    TIES = "ties"
    UNPRUNABLE = "unprunable"
    OPERATORS = "operator_trace"


class Place(NamedTuple):
    """Where an entry of a record was made.

    Attributes:
        module: Name of the module that ran.
        line: The line of code.
        given: The labels that the operator there was given.
    """

    module: str = "the model"
    line: SourceLine = _NOWHERE
    given: Sequence[Labels] = ()


class Trial(Tracer):
    """Follow a smaller network; modules that fail return what they did in the full network, less what is pruned.

    Args:
        tables: What operators say about channels.
        known: What the full network has shown.
        full: Its record; None if that is not known.
        shrinking: How the network is made smaller.
        kept: The labels that are kept.

    Attributes:
        failures: The modules that failed, in the order in which they did.
    """

    def __init__(
        self, tables: OperatorTables, known: Known, full: Record | None, shrinking: Shrinking, kept: KeptLabels
    ) -> None:
        super().__init__(tables, known)
        self.full = kept.comparable(full or Record())
        self.shrinking = shrinking
        self.kept = kept
        self.failures: list[Failure] = []
        self._raised: list[Exception] = []  # by the modules that failed
        self._places: dict[Entries, dict[int, Place]] = {entries: {} for entries in Entries}  # by number of the entry
        self._here: Place | None = None  # of the operator that runs, once it has been looked up

    def place(self, entries: Entries, number: int) -> Place:
        """Return where an entry of the record was made or, if a module that failed has not made it, the next one.

        Args:
            entries: The list of the record.
            number: Number of the entry.
        """
        places = self._places[entries]
        if number in places:
            return places[number]
        made = [entry for entry in places if entry >= number]
        return places[min(made)] if made else Place()

    def ran(self, operator: int) -> bool:
        """Tell whether an operator of the record ran here, not only in the full network in a module that failed."""
        return operator in self._places[Entries.OPERATORS]

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        """Tie as any tracer does, and note where."""
        super().tie(first, second, why)
        self._note_place(Entries.TIES)

    def mark_unprunable(self, labels: Labels | None, why: str) -> None:
        """Mark as any tracer does, and note where."""
        super().mark_unprunable(labels, why)
        self._note_place(Entries.UNPRUNABLE)

    def _apply(self, rule: TracerRule, call: Call, given: list[Labels], inputs: list[Tensor]) -> None:
        self._here = Place(self.where(), running_line(), given)
        self._note_place(Entries.OPERATORS)
        super()._apply(rule, call, given, inputs)
        if self.on_data and not self.kept.concern([*given, *self.record.output_labels[-1].values()]):
            self._forget_operator()

    def _forget_operator(self) -> None:
        """Forget an operator that has to do with no channel of a group: how often it runs may depend on values."""
        record = self.record
        for entries in (record.operator_trace, record.output_labels, record.given_labels):
            entries.pop()
        self._places[Entries.OPERATORS].pop(len(record.operator_trace), None)

    def _follow(self, operator: Operator, call: Call, inputs: list[Tensor]) -> None:
        super()._follow(operator, call, inputs)
        self._here = None

    def _note_place(self, entries: Entries) -> None:
        """Note where the last entry of a list was made, unless that is known."""
        number = len(getattr(self.record, entries.value)) - 1
        places = self._places[entries]
        if number not in places:
            places[number] = self._here or Place(self.where(), running_line())

    def tie_parts(self, labels: Labels, size: int) -> None:
        """Tie nothing: parts of equal size may be so by chance, and it shows elsewhere if they are the wrong ones."""

    def again(self, output: Any) -> Any:
        """Return what a module returned in another pass, less what is pruned."""
        return tree_map(self._shrunk, output)

    def instead_of(self, key: CallKey, start: int, inputs: Any, raised: Exception) -> Any:
        """Note the failure where it happened first, and return what the module would have returned."""
        in_full = self._call_in_full(key, start)
        noted_in_submodule = self._raised[-1:] == [raised]
        if not noted_in_submodule:
            self.note_failure(key, inputs, raised, in_full)
        if in_full is None:
            raise raised
        self._skip(start, in_full.stop)
        return tree_map(self._shrunk, in_full.output)

    def _call_in_full(self, key: CallKey, start: int) -> ModuleCall | None:
        """Return the same call in the full network, if what it returned there can stand in for its output."""
        call = self.full.module_calls.get(key)
        if call is None or call.start != start or not _is_without_data(call.output):
            return None
        return call

    def note_failure(self, key: CallKey, inputs: Any, raised: Exception, in_full: ModuleCall | None = None) -> None:
        """Note that a module failed.

        Args:
            key: The call of the module.
            inputs: What it was given.
            raised: What it raised.
            in_full: The call in the full network, if the trial goes on behind it.
        """
        record = self.record
        at = len(record.operator_trace)
        self._raised.append(raised)
        self.failures.append(
            Failure(
                key=key,
                line=_NOWHERE,
                given=self.labels_of(self.running_inputs),
                last_output=list(record.output_labels[-1].values()) if record.output_labels else [],
                module_inputs=self.labels_of(tree_leaves(inputs)),
                at=at,
                resumed=at if in_full is None else in_full.stop,
                ties=len(record.ties),
                unprunable=len(record.unprunable),
            )
        )
        self.running_inputs = []

    def end(self) -> None:
        """Note where failures were raised, and let go of what was raised, which refers to all that ran."""
        pairs = list(zip(self.failures, self._raised, strict=True))
        self.failures = [replace(failure, line=raising_line(raised)) for failure, raised in pairs]
        self._raised = []

    def first_shift(self, start: int, stop: int) -> int | None:
        """Find the first of some operators whose output does not have just the kept channels; see `comparison`."""
        return first_shift(self.full, self.record, self.kept, start, stop)

    def covers(self, full: Record) -> bool:
        """Tell whether the trial did all that the full network did, in order, to just the kept channels."""
        return covers(self.record, self.kept.comparable(full), self.kept)

    def _skip(self, start: int, stop: int) -> None:
        """Take over the operator trace of the full network for a module that failed; what it did has no labels."""
        record = self.record
        at = len(record.operator_trace)
        record.operator_trace[start:] = self.full.operator_trace[start:stop]
        record.output_labels[at:] = [{}] * (stop - at)
        del record.output_labels[stop:]

    def _shrunk(self, leaf: Any) -> Any:
        """Return a tensor of the full network without the channels that are pruned."""
        if not isinstance(leaf, Tensor):
            return leaf
        kept = {}
        shape = list(leaf.shape)
        for axis, labels in self.all_labels(leaf).items():
            kept[axis] = self.kept.among(labels)
            shape[axis] = len(kept[axis])
        shrunk = torch.empty(shape, dtype=leaf.dtype, device="meta")
        shrunk._is_weight = self.is_weight(leaf)  # type: ignore[attr-defined]
        self.set_labels(shrunk, kept)
        return shrunk


def _is_without_data(output: Any) -> bool:
    """Tell whether all tensors in an output can be found, and none has data."""
    return all(
        leaf.is_meta if isinstance(leaf, Tensor) else isinstance(leaf, int | float | str | None)
        for leaf in tree_leaves(output)
    )


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """What is done in a trial beside pruning groups.

    Attributes:
        adaptations: What follows the groups in modules, by the names of these.
        beside: Groups that are not tried but pruned in every trial, by name.
    """

    adaptations: Mapping[str, Adaptation] = field(default_factory=dict)
    beside: Mapping[str, PlannedGroup] = field(default_factory=dict)


class TrialRunner:
    """Run a network with fewer channels in some groups.

    Args:
        forward: The forward pass.
        grouping: The groups.
        tables: What operators say about channels.
        known: What the full network has shown.
        fitted: What follows the groups, and what else is pruned.
    """

    def __init__(
        self, forward: Forward, grouping: Grouping, tables: OperatorTables, known: Known, fitted: Fitted
    ) -> None:
        self.forward = forward
        self.grouping = grouping
        self.tables = tables
        self.known = known
        self.fitted = fitted

    def run(self, shrinking: Shrinking, full: Record | None) -> Trial:
        """Return a trial that has run, past all failures if that is possible.

        Args:
            shrinking: How the network is made smaller.
            full: What the full network showed in this mode, if that is known.
        """
        plan = self._plan(shrinking)
        trial = Trial(self.tables, self.known, full, shrinking, self._kept_labels(plan.index()))
        try:
            self.forward.run(trial, plan, shrinking.training)
        except Exception as raised:
            if not trial.failures:  # a hook of the whole model failed, which is no module's forward
                trial.note_failure(CallKey(trial.where(), 0), (), raised)
        trial.end()
        return trial

    def _plan(self, shrinking: Shrinking) -> PruningPlan:
        groups = list(self.grouping.groups.values())
        planned = dict(self.fitted.beside)
        for number in shrinking.groups:
            group = groups[number]
            if is_pair(group):
                continue
            kept = _kept_channels(number, group, shrinking.pruned)
            positions = tuple(kept.tolist())
            planned[group.name] = PlannedGroup(group.size, positions, group.slices)
        return PruningPlan(planned, self.forward.shapes, adaptations=dict(self.fitted.adaptations))

    def _kept_labels(self, kept: Index) -> KeptLabels:
        is_kept = np.ones(self.forward.labelled.count, dtype=bool)
        for tensor, kept_by_axis in kept.items():
            for axis, positions in kept_by_axis.items():
                labels = self.forward.labelled.labels(tensor)[axis].numpy()
                is_kept[labels] = False
                is_kept[labels[positions.numpy()]] = True
        is_prunable = self.grouping.group_of >= 0
        return KeptLabels(is_kept, is_prunable, with_others=bool(self.fitted.beside))
