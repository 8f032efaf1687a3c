"""Try channel groups out on a smaller network before anyone relies on them."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.groups import Coupling
from lightning_prune.graph.run import Forward, Index
from lightning_prune.graph.tracer import Call, Known, Labels, Note, Record, Tables, Tie, Tracer, is_user_code

__all__ = ["UNEXPLAINED", "Finding", "Prober"]

_WHY = "relies on the number of its channels"


@dataclass(frozen=True)
class Finding:
    """Something that does not hold in a smaller network.

    Attributes:
        groups: The groups that it concerns, by index.
        module: Name of the module that relies on them.
        why: How, with the line of code.
        site: The line of code that splits an axis, if the trouble is there.
    """

    groups: frozenset[int]
    module: str
    why: str
    site: tuple[str, int, int] | None = None

    def note(self, coupling: Coupling) -> Note:
        """Return it as a reason to hold the groups."""
        labels = np.flatnonzero(np.isin(coupling.group_of, list(self.groups)))
        return Note(torch.from_numpy(labels), self.module, self.why)


UNEXPLAINED = Finding(frozenset(), "", "")  # to be looked for again with the record of the whole network


def _line_of(raised: Exception) -> str:
    line, trace = "", raised.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_user_code(code.co_filename):
            line = f" ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return line


@dataclass(frozen=True)
class _Sample:
    """Which channels are missing in a run.

    Attributes:
        groups: The groups that lose about half of their channels, by index.
        which: The channels that they lose: "first", "last", or some "everywhere".
        training: The mode to run in.
    """

    groups: Sequence[int]
    which: str
    training: bool


@dataclass(frozen=True)
class _Failure:
    """A module that failed.

    Attributes:
        visit: Its name, and how often it had run before.
        raised: What it raised.
        given: What the operator that failed was given, if an operator did.
        likely: What may be the cause otherwise: the output of the last operator, and what the module was given.
        at: How many operators had run.
        resumed: How many have run in the whole network when this module is through.
        noted: How many ties and holds there were.
    """

    visit: tuple[str, int]
    raised: Exception
    given: list[Labels]
    likely: tuple[list[Labels], list[Labels]]
    at: int
    resumed: int
    noted: tuple[int, int]


class _Trial(Tracer):
    """Go on past modules that fail: they return what they did in the whole network, less the missing channels.

    Args:
        tables: Rules and costs.
        known: What the whole network has shown.
        whole: Its record, if it is at hand.
        sample: Which channels are missing.
        left: (labels,) which labels are left.
    """

    def __init__(self, tables: Tables, known: Known, whole: Record | None, sample: _Sample, left: np.ndarray) -> None:
        super().__init__(tables, known)
        self.whole, self.sample, self.left = whole or Record(), sample, torch.from_numpy(left)
        self.failures: list[_Failure] = []
        self.alike: set[tuple[int, int]] = set()

    def tie_parts(self, labels: Labels, size: int) -> None:
        """Tie nothing: parts of equal size may be so by chance, and it shows elsewhere if they are the wrong ones."""

    def instead(self, visit: tuple[str, int], start: int, inputs: Any, raised: Exception) -> Any:
        """Note the failure where it happened first, and return what the module would have returned."""
        record, before = self.record, self.whole.visits.get(visit)
        at = len(record.course)
        if before is not None and (before.start != start or not _plain(before.output)):
            before = None
        if not self.failures or self.failures[-1].raised is not raised:
            given = self.labels_of([] if self.running is None else self.running.given)
            likely = list(record.passed[-1].values()) if record.passed else [], self.labels_of(tree_leaves(inputs))
            noted = len(record.ties), len(record.holds)
            self.failures.append(_Failure(visit, raised, given, likely, at, before.stop if before else at, noted))
            self.running = None
        if before is None:
            raise raised
        record.course[start:] = self.whole.course[start : before.stop]
        record.passed[at:] = [{}] * (before.stop - at)
        del record.passed[before.stop :]
        return tree_map(self._less, before.output)

    def _less(self, leaf: Any) -> Any:
        """Return a tensor of the whole network without the channels that are missing."""
        if not isinstance(leaf, Tensor):
            return leaf
        axes = {axis: labels[self.left[labels]] for axis, labels in self.all_labels(leaf).items()}
        shape = [len(axes[axis]) if axis in axes else size for axis, size in enumerate(leaf.shape)]
        made = torch.empty(shape, dtype=leaf.dtype, device="meta")
        made._is_weight = self.is_weight(leaf)  # type: ignore[attr-defined]
        self.set_labels(made, axes)
        return made


def _plain(output: Any) -> bool:
    """Tell whether all tensors in an output can be found, and none has data."""
    leaves = tree_leaves(output)
    return all(leaf.is_meta if isinstance(leaf, Tensor) else isinstance(leaf, _SIMPLE) for leaf in leaves)


_SIMPLE = (int, float, str, type(None))
_NONE = torch.zeros(0, dtype=torch.int64)


class _Stop(BaseException):
    """The place that was looked for has been reached."""


@dataclass(frozen=True)
class _Place:
    """Where something happens: the module, the line of code, and the labels that the operator there was given."""

    module: str
    line: str
    given: list[Labels]


class _Locator(_Trial):
    """Run until a list of the record has grown to some length: where was that?"""

    def __init__(self, kind: str, length: int, *args: Any) -> None:
        super().__init__(*args)
        self.kind, self.length = kind, length
        self.found: _Place | None = None
        self.given: list[Labels] = []

    def _note(self) -> None:
        if self.found is None and len(getattr(self.record, self.kind)) >= self.length:
            self.found = _Place(self.where(), self.line(), self.given)
            raise _Stop

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        super().tie(first, second, why)
        self._note()

    def mark_unprunable(self, labels: Labels | None, why: str) -> None:
        super().mark_unprunable(labels, why)
        self._note()

    def _apply(self, rule: Callable[[Tracer, Call], None], call: Call, tensors: list[Tensor]) -> None:
        self.given = self.labels_of(tensors)
        super()._apply(rule, call, tensors)
        self._note()


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Tell which values are among others, which ascend."""
    at = np.searchsorted(known, values)
    found = at < len(known)
    found[found] = known[at[found]] == values[found]
    return found


class Prober:
    """Run networks with channels missing and say what does not fit.

    The smaller network must couple nothing that the whole one did not: where it does, positions have shifted against
    each other, because a size is written into the code.

    Args:
        forward: The forward pass.
        coupling: The groups to try.
        tables: Rules and costs.
        known: What the whole network has shown.
    """

    def __init__(self, forward: Forward, coupling: Coupling, tables: Tables, known: Known) -> None:
        self.forward, self.coupling, self.known = forward, coupling, known
        self.tables = Tables(tables.rules, {})
        self.free = coupling.group_of >= 0

    def probe(self, training: bool, whole: Record | None) -> tuple[list[Finding], _Trial]:
        """Run once with about half of the channels of all groups, and more often if channels are cut.

        Args:
            training: The mode to run in.
            whole: What the whole network showed in this mode; None if that is not known, and what is found is then
                not explained.

        Returns:
            What was found, and the first run.
        """
        every = _Sample(range(len(self.coupling.groups)), "everywhere", training)
        trial = self._try(every, whole)
        if whole is None:  # without which nothing can be explained
            record = trial.record
            fits = not trial.failures and self._first_bad_tie(record.ties) is None and not self._held(record)
            return [] if fits else [UNEXPLAINED], trial
        findings = self._explained(trial, whole)
        # A wrong place can be right by chance: a quarter of one half is one half of a quarter.
        for sample in self._samples(every) if self.cuts(whole) else ():
            if findings:
                break
            findings = self._explained(self._try(sample, whole), whole)
        return findings, trial

    def cuts(self, whole: Record) -> bool:
        """Tell whether channels that may leave are cut somewhere."""
        return any(self.free[labels.numpy()].any() for labels in whole.cut)

    def covers(self, trial: _Trial, whole: Record) -> bool:
        """Tell whether a run did all that the whole network does, in order, to just the channels that are left."""
        steps = iter(zip(trial.record.course, trial.record.passed, strict=True))
        return all(
            any(did == does and self._alike(trial, before, after) for did, after in steps)
            for does, before in zip(whole.course, whole.passed, strict=True)
        )

    def _samples(self, every: _Sample) -> Iterator[_Sample]:
        """Remove from either end of all groups, then from some so that each loses channels where another does not."""
        yield replace(every, which="first")
        yield replace(every, which="last")
        # All groups are in equally many of the runs, and no two in the same.
        count = len(every.groups)
        runs = next(runs for runs in itertools.count(2) if math.comb(runs, runs // 2) >= count)
        members = list(zip(every.groups, itertools.combinations(range(runs), runs // 2), strict=False))
        for run in range(runs) if count > 1 else ():
            yield _Sample([group for group, within in members if run in within], "first", every.training)

    def _explained(self, trial: _Trial, whole: Record) -> list[Finding]:
        bad_tie, held = self._first_bad_tie(trial.record.ties), self._held(trial.record)
        # What comes after channels have met others than their own may only be due to that.
        failures = [
            failure
            for failure in trial.failures
            if (bad_tie is None or failure.noted[0] <= bad_tie) and (not held or failure.noted[1] <= held[0])
        ]
        if failures:
            return self._blamed(failures, trial)
        if bad_tie is not None or held:
            return [self._misplaced(trial, bad_tie, held)]
        if trial.record.course != whole.course:
            return [self._astray(trial)]
        shifted = self._first_shift(trial, 0, len(whole.course))
        return [] if shifted is None else [self._cut(trial, shifted)]

    def _stays(self, sample: _Sample) -> Index:
        names = list(self.coupling.groups)
        kept = {}
        for number in sample.groups:
            size = self.coupling.groups[names[number]].size
            every = torch.arange(size)
            if sample.which == "first":
                kept[names[number]] = every[size // 2 :]
            elif sample.which == "last":
                kept[names[number]] = every[: (size + 1) // 2]
            elif size == 3:
                kept[names[number]] = every[1:]
            else:  # not everywhere the same share: groups that must not be mistaken for each other become unlike
                kept[names[number]] = every[1::2] if number % 2 == 0 or size < 4 else every[every % 3 != 1]
        graph = ChannelGraph(self.forward.part, self.coupling.groups, self.coupling.unprunable, self.forward.shapes, {})
        return graph.plan(kept).index()

    def _try(self, sample: _Sample, whole: Record | None) -> _Trial:
        stays = self._stays(sample)
        trial = _Trial(self.tables, self.known, whole, sample, self._left(stays))
        try:
            self.forward.run(trial, stays, sample.training)
        except Exception as raised:
            if not trial.failures:
                trial.instead(("the model", 0), len(trial.record.course), (), raised)
        return trial

    def _left(self, stays: Index) -> np.ndarray:
        """Return which labels are left: (labels,)."""
        left = np.ones(self.forward.count, dtype=bool)
        for tensor, axes in stays.items():
            for axis, index in axes.items():
                labels = self.forward.labels(tensor)[axis]
                left[labels.numpy()] = False
                left[labels[index].numpy()] = True
        return left

    # -- what was found --------------------------------------------------------------------------------------------

    def _misplaced(self, trial: _Trial, bad_tie: int | None, held: list[int]) -> Finding:
        """Name the first place where channels meet others than their own, or something holds on to them."""
        record = trial.record
        if bad_tie is not None:
            tie = record.ties[bad_tie]
            labels, kind, length = torch.cat([tie.first.reshape(-1), tie.second.reshape(-1)]), "ties", bad_tie + 1
        else:
            labels, kind, length = record.holds[held[0]].labels, "holds", held[0] + 1
        shifted = self._first_shift(trial, 0, len(record.course))
        if shifted is not None:
            kind, length = "course", shifted + 1
        place = self._locate(kind, length, trial)
        site = trial.split_ties.get(bad_tie) if bad_tie is not None else None
        return Finding(self._groups([labels]), place.module, f"{_WHY}{place.line}", site)

    def _cut(self, trial: _Trial, shifted: int) -> Finding:
        """Name the channels that an operator cuts at a wrong place."""
        place = self._locate("course", shifted + 1, trial)
        groups = self._groups(place.given) or self._culprits(
            trial, lambda again: self._first_shift(again, 0, shifted + 1) is not None
        )
        return Finding(groups, place.module, f"{_WHY}{place.line}")

    def _held(self, record: Record) -> list[int]:
        return [i for i, note in enumerate(record.holds) if self.free[note.labels.numpy()].any()]

    def _locate(self, kind: str, length: int, trial: _Trial) -> _Place:
        stays = self._stays(trial.sample)
        locator = _Locator(kind, length, self.tables, self.known, trial.whole, trial.sample, self._left(stays))
        with suppress(_Stop, Exception):
            self.forward.run(locator, stays, trial.sample.training)
        return locator.found or _Place("the model", "", [])

    def _first_shift(self, trial: _Trial, start: int, stop: int) -> int | None:
        """Find the first of some operators whose output does not have just the channels that are left of it."""
        whole, record = trial.whole, trial.record
        for i in range(start, min(stop, len(whole.course), len(record.course))):
            if record.course[i][0] is not whole.course[i][0]:
                return None
            if not self._alike(trial, whole.passed[i], record.passed[i]):
                return i
        return None

    def _alike(self, trial: _Trial, whole: dict[int, Labels], passed: dict[int, Labels]) -> bool:
        """Tell whether an output has just the channels that are left of what it has in the whole network."""
        for axis in whole.keys() | passed.keys():
            before, after = whole.get(axis, _NONE), passed.get(axis, _NONE)
            both = id(before), id(after)  # most operators pass on the very labels that they are given
            if both not in trial.alike:
                if not torch.equal(before[trial.left[before]], after):
                    return False
                trial.alike.add(both)
        return True

    def _first_bad_tie(self, ties: list[Tie]) -> int | None:
        lengths: list[int] = []
        for i, tie in enumerate(ties):
            if tie.first.numel() != tie.second.numel():
                ours = self._groups([tie.first.reshape(-1), tie.second.reshape(-1)])
                if ours:
                    return min(i, self._first_unlike(ties[:i], lengths, i))
                ties = [*ties[:i], Tie(tie.first[:0], tie.first[:0], tie.module, tie.why), *ties[i + 1 :]]
            lengths.append(ties[i].first.numel())
        found = self._first_unlike(ties, lengths, len(ties))
        return found if found < len(ties) else None

    def _first_unlike(self, ties: list[Tie], lengths: list[int], none: int) -> int:
        if not ties:
            return none
        first = np.concatenate([tie.first.numpy().reshape(-1) for tie in ties])
        second = np.concatenate([tie.second.numpy().reshape(-1) for tie in ties])
        # Not only of the same channel, but the very positions that met before: the order within a channel counts too.
        apart = np.flatnonzero((first != second) & (self.free[first] | self.free[second]))
        bad = apart[~_among(first[apart] * self.forward.count + second[apart], self.coupling.pairs)]
        return int(np.searchsorted(np.cumsum(lengths), bad[0], side="right")) if len(bad) else none

    def _groups(self, labels: list[Labels]) -> frozenset[int]:
        found = [self.coupling.group_of[along.numpy()] for along in labels]
        return frozenset(np.unique(np.concatenate(found)).tolist()) - {-1} if found else frozenset()

    def _blamed(self, failures: list[_Failure], trial: _Trial) -> list[Finding]:
        """Hold what the operators that failed were given or, where Python code failed, what makes it fail.

        That is most often what the last operator returned, or what the module was given; further runs, in which
        nothing else is smaller, tell.
        """
        suspects = {failure.visit: self._groups(failure.given) for failure in failures}
        for cause in (0, 1):
            likely = {f.visit: self._groups(f.likely[cause]) for f in failures if not suspects[f.visit]}
            if any(likely.values()):
                groups = sorted(frozenset().union(*likely.values()))
                again = self._try(replace(trial.sample, groups=groups), trial.whole)
                suspects.update({f.visit: likely[f.visit] for f in again.failures if f.visit in likely})
        findings, resumed = [], 0
        for failure in failures:
            shifted = self._first_shift(trial, resumed, failure.at)
            if shifted is not None:
                findings.append(self._cut(trial, shifted))
            elif suspects[failure.visit]:
                why = f"{_WHY}{_line_of(failure.raised)}"
                findings.append(Finding(suspects[failure.visit], failure.visit[0], why))
            resumed = failure.resumed
        return findings or [self._searched(failures[0], trial)]

    def _searched(self, failure: _Failure, trial: _Trial) -> Finding:
        """Search for what makes code fail that gives no hint."""
        groups = self._culprits(trial, lambda again: bool(again.failures))
        return Finding(groups, failure.visit[0], f"{_WHY}{_line_of(failure.raised)}")

    def _astray(self, trial: _Trial) -> Finding:
        """Find the groups whose size changes what the network does, or a number that it computes with."""
        expected, course = trial.whole.course, trial.record.course
        at = next((i for i, (a, b) in enumerate(zip(expected, course, strict=False)) if a != b), len(course) - 1)
        place = self._locate("course", at + 1, trial)
        groups = self._culprits(trial, lambda again: again.record.course != expected)
        return Finding(groups, place.module, f"computes with the number of its channels{place.line}")

    def _culprits(self, trial: _Trial, bad: Callable[[_Trial], bool]) -> frozenset[int]:
        """Narrow down the groups that must be small for something to go wrong, by halves."""
        suspects = trial.sample.groups
        while len(suspects) > 1:
            half = len(suspects) // 2
            for part in (suspects[:half], suspects[half:]):
                if bad(self._try(replace(trial.sample, groups=part), trial.whole)):
                    suspects = part
                    break
            else:
                break  # it takes some of both
        return frozenset(suspects)
