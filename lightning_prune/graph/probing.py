"""Try channel groups out on a smaller network before anyone relies on them."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.coupling import Coupling
from lightning_prune.graph.forward import Forward, Index
from lightning_prune.graph.tracer import Known, Labels, Note, Record, Tables, Tie, Tracer, is_user_code

__all__ = ["Finding", "Prober"]

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


def _line_of(raised: Exception) -> str:
    line, trace = "", raised.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_user_code(code.co_filename):
            line = f" ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return line


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
        left: (labels,) which labels are left.
    """

    def __init__(self, tables: Tables, known: Known, whole: Record | None, left: np.ndarray) -> None:
        super().__init__(tables, known)
        self.whole, self.left = whole or Record(), torch.from_numpy(left)
        self.failures: list[_Failure] = []

    def instead(self, visit: tuple[str, int], start: int, inputs: Any, raised: Exception) -> Any:
        """Note the failure where it happened first, and return what the module would have returned."""
        record, before = self.record, self.whole.visits.get(visit)
        at = len(record.course)
        if before is not None and (before.start != start or not _plain(before.output)):
            before = None
        if not self.failures or self.failures[-1].raised is not raised:
            given = self._all_labels([] if self.running is None else self.running.given)
            likely = list(record.passed[-1].values()) if record.passed else [], self._all_labels(inputs)
            noted = len(record.ties), len(record.holds)
            self.failures.append(_Failure(visit, raised, given, likely, at, before.stop if before else at, noted))
            self.running = None
        if before is None:
            raise raised
        record.course[start:] = self.whole.course[start : before.stop]
        record.passed[at:] = [{}] * (before.stop - at)
        del record.passed[before.stop :]
        return tree_map(self._less, before.output)

    def _all_labels(self, values: Any) -> list[Labels]:
        return [labels for leaf in tree_leaves(values) for labels in self.all_labels(leaf).values()]

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


class _Stop(BaseException):
    """The place that was looked for has been reached."""


class _Locator(_Trial):
    """Run until a list of the record has grown to some length: where was that?"""

    def __init__(self, kind: str, length: int, *args: Any) -> None:
        super().__init__(*args)
        self.kind, self.length = kind, length
        self.found: tuple[str, str] | None = None

    def _note(self) -> None:
        if self.found is None and len(getattr(self.record, self.kind)) >= self.length:
            self.found = (self.where(), self.line())
            raise _Stop

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        super().tie(first, second, why)
        self._note()

    def hold(self, labels: Labels | None, why: str) -> None:
        super().hold(labels, why)
        self._note()

    def _follow(self, *args: object) -> None:
        super()._follow(*args)  # type: ignore[arg-type]
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

    def probe(self, training: bool, whole: Record | None) -> tuple[list[Finding], Record]:
        """Run once with about half of the channels of all groups.

        Args:
            training: The mode to run in.
            whole: What the whole network showed in this mode; None if that is not known, and what is found is then
                not explained.

        Returns:
            What was found, and the record of the run.
        """
        stays = self._stays(range(len(self.coupling.groups)))
        trial = self._try(stays, training, whole)
        bad_tie, held = self._first_bad_tie(trial.record.ties), self._held(trial.record)
        if whole is None:  # without which nothing can be explained
            fits = not trial.failures and bad_tie is None and not held
            return [] if fits else [Finding(frozenset(), "", "")], trial.record
        # What comes after channels have met others than their own may only be due to that.
        failures = [
            failure
            for failure in trial.failures
            if (bad_tie is None or failure.noted[0] <= bad_tie) and (not held or failure.noted[1] <= held[0])
        ]
        if failures:
            findings = self._blamed(failures, trial, stays, training)
        elif bad_tie is not None or held:
            findings = [self._misplaced(trial, bad_tie, held, stays, training)]
        elif trial.record.course != whole.course:
            findings = [self._astray(trial, stays, training)]
        else:
            findings = []
        return findings, trial.record

    def _stays(self, groups: Iterable[int]) -> Index:
        names = list(self.coupling.groups)
        kept = {}
        for number in groups:
            size = self.coupling.groups[names[number]].size
            every = torch.arange(size)
            # Not everywhere the same share: groups that must not be mistaken for each other become unlike.
            kept[names[number]] = every[1::2] if number % 2 == 0 or size < 4 else every[every % 3 != 1]
            if size == 3:
                kept[names[number]] = every[1:]
        graph = ChannelGraph(self.forward.part, self.coupling.groups, self.coupling.held, self.forward.shapes, {})
        return graph.plan(kept).index()

    def _try(self, stays: Index, training: bool, whole: Record | None) -> _Trial:
        trial = _Trial(self.tables, self.known, whole, self._left(stays))
        try:
            self.forward.run(trial, stays, training)
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

    def _misplaced(self, trial: _Trial, bad_tie: int | None, held: list[int], stays: Index, training: bool) -> Finding:
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
        module, line = self._locate(kind, length, trial, stays, training)
        site = trial.split_ties.get(bad_tie) if bad_tie is not None else None
        return Finding(self._groups([labels]), module, f"{_WHY}{line}", site)

    def _held(self, record: Record) -> list[int]:
        return [i for i, note in enumerate(record.holds) if self.free[note.labels.numpy()].any()]

    def _locate(self, kind: str, length: int, trial: _Trial, stays: Index, training: bool) -> tuple[str, str]:
        locator = _Locator(kind, length, self.tables, self.known, trial.whole, self._left(stays))
        with suppress(_Stop, Exception):
            self.forward.run(locator, stays, training)
        return locator.found or ("the model", "")

    def _first_shift(self, trial: _Trial, start: int, stop: int) -> int | None:
        """Find the first of some operators whose output does not have just the channels that are left of it."""
        component, left = self.coupling.component, trial.left.numpy()
        whole, record = trial.whole, trial.record
        none = torch.zeros(0, dtype=torch.int64)
        for i in range(start, min(stop, len(whole.course), len(record.course))):
            if record.course[i][0] is not whole.course[i][0]:
                return None
            for axis in whole.passed[i].keys() | record.passed[i].keys():
                before, after = whole.passed[i].get(axis, none).numpy(), record.passed[i].get(axis, none).numpy()
                if not np.array_equal(component[before[left[before]]], component[after]):
                    return i
        return None

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

    def _blamed(self, failures: list[_Failure], trial: _Trial, stays: Index, training: bool) -> list[Finding]:
        """Hold what the operators that failed were given or, where Python code failed, what makes it fail.

        That is most often what the last operator returned, or what the module was given; further runs, in which
        nothing else is smaller, tell.
        """
        suspects = {failure.visit: self._groups(failure.given) for failure in failures}
        for cause in (0, 1):
            likely = {f.visit: self._groups(f.likely[cause]) for f in failures if not suspects[f.visit]}
            if any(likely.values()):
                again = self._try(self._stays(sorted(frozenset().union(*likely.values()))), training, trial.whole)
                suspects.update({f.visit: likely[f.visit] for f in again.failures if f.visit in likely})
        findings, resumed = [], 0
        for failure in failures:
            if suspects[failure.visit]:
                module, line = failure.visit[0], _line_of(failure.raised)
                shifted = self._first_shift(trial, resumed, failure.at)
                if shifted is not None:
                    module, line = self._locate("course", shifted + 1, trial, stays, training)
                findings.append(Finding(suspects[failure.visit], module, f"{_WHY}{line}"))
            resumed = failure.resumed
        return findings or [self._searched(failures[0], training)]

    def _searched(self, failure: _Failure, training: bool) -> Finding:
        """Search for what makes code fail that gives no hint."""
        groups = self._culprits(lambda some: bool(self._try(self._stays(some), training, None).failures))
        return Finding(groups, failure.visit[0], f"{_WHY}{_line_of(failure.raised)}")

    def _astray(self, trial: _Trial, stays: Index, training: bool) -> Finding:
        """Find the groups whose size changes what the network does, or a number that it computes with."""
        expected, course = trial.whole.course, trial.record.course
        at = next((i for i, (a, b) in enumerate(zip(expected, course, strict=False)) if a != b), len(course) - 1)
        module, line = self._locate("course", at + 1, trial, stays, training)
        groups = self._culprits(lambda some: self._try(self._stays(some), training, None).record.course != expected)
        return Finding(groups, module, f"computes with the number of its channels{line}")

    def _culprits(self, bad: Callable[[list[int]], bool]) -> frozenset[int]:
        """Narrow down the groups that must be small for something to go wrong, by halves."""
        suspects = list(range(len(self.coupling.groups)))
        while len(suspects) > 1:
            half = len(suspects) // 2
            for part in (suspects[:half], suspects[half:]):
                if bad(part):
                    suspects = part
                    break
            else:
                break  # it takes some of both
        return frozenset(suspects)
