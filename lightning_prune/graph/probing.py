"""Try channel groups out on a smaller network before anyone relies on them."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

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


class _Stop(BaseException):
    """The place that was looked for has been reached."""


class _Locator(Tracer):
    """Run until a list of the record has grown to some length: where was that?"""

    def __init__(self, tables: Tables, known: Known, kind: str, length: int) -> None:
        super().__init__(tables, known)
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

    def probe(self, training: bool, whole: Record | None) -> tuple[Finding | None, Record]:
        """Run once with about half of the channels of all groups.

        Args:
            training: The mode to run in.
            whole: What the whole network showed in this mode; None if that is not known, and what is found is then
                not explained.

        Returns:
            What was found, and the record of the run.
        """
        everything = range(len(self.coupling.groups))
        stays = self._stays(everything)
        tracer, raised = self._run(Tracer(self.tables, self.known), stays, training)
        if whole is None:  # without which nothing can be explained
            fits = raised is None and self._first_bad_tie(tracer.record.ties) is None and not self._held(tracer.record)
            return None if fits else Finding(frozenset(), "", ""), tracer.record
        finding = self._misplaced(tracer, whole, stays, training) or self._blamed(
            tracer, raised, whole, stays, training
        )
        if finding is None and tracer.record.course != whole.course:
            finding = self._astray(whole.course, tracer.record.course, training)
        return finding, tracer.record

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

    def _run(self, tracer: Tracer, stays: Index, training: bool) -> tuple[Tracer, Exception | None]:
        try:
            self.forward.run(tracer, stays, training)
        except _Stop:
            pass
        except Exception as raised:
            return tracer, raised
        return tracer, None

    # -- what was found --------------------------------------------------------------------------------------------

    def _misplaced(self, tracer: Tracer, whole: Record, stays: Index, training: bool) -> Finding | None:
        """Look for channels that meet others than their own, or that something holds on to."""
        record = tracer.record
        at = self._first_bad_tie(record.ties)
        if at is not None:
            tie = record.ties[at]
            labels, kind, length = torch.cat([tie.first.reshape(-1), tie.second.reshape(-1)]), "ties", at + 1
        else:
            held = self._held(record)
            if not held:
                return None
            labels, kind, length = record.holds[held[0]].labels, "holds", held[0] + 1
        shifted = self._first_shift(record, whole, stays)
        if shifted is not None:
            kind, length = "course", shifted + 1
        module, line = self._locate(kind, length, stays, training)
        site = tracer.split_ties.get(at) if at is not None else None
        return Finding(self._groups(labels), module, f"{_WHY}{line}", site)

    def _held(self, record: Record) -> list[int]:
        return [i for i, note in enumerate(record.holds) if self.free[note.labels.numpy()].any()]

    def _locate(self, kind: str, length: int, stays: Index, training: bool) -> tuple[str, str]:
        locator = _Locator(self.tables, self.known, kind, length)
        self._run(locator, stays, training)
        return locator.found or ("the model", "")

    def _first_shift(self, record: Record, whole: Record, stays: Index) -> int | None:
        """Find the first operator whose output does not have just the channels that are left of it."""
        left = np.ones(self.forward.count, dtype=bool)
        for tensor, axes in stays.items():
            for axis, index in axes.items():
                labels = self.forward.labels(tensor)[axis]
                left[labels.numpy()] = False
                left[labels[index].numpy()] = True
        component = self.coupling.component
        for i, (ours, theirs) in enumerate(zip(record.course, whole.course, strict=False)):
            if ours[0] is not theirs[0]:
                return None
            for axis in whole.passed[i].keys() | record.passed[i].keys():
                before = whole.passed[i].get(axis, torch.zeros(0, dtype=torch.int64)).numpy()
                after = record.passed[i].get(axis, torch.zeros(0, dtype=torch.int64)).numpy()
                if not np.array_equal(component[before[left[before]]], component[after]):
                    return i
        return None

    def _first_bad_tie(self, ties: list[Tie]) -> int | None:
        lengths: list[int] = []
        for i, tie in enumerate(ties):
            if tie.first.numel() != tie.second.numel():
                ours = self._groups(torch.cat([tie.first.reshape(-1), tie.second.reshape(-1)]))
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
        met = (first == second) | np.isin(first * self.forward.count + second, self.coupling.pairs)
        bad = np.flatnonzero(~met & (self.free[first] | self.free[second]))
        return int(np.searchsorted(np.cumsum(lengths), bad[0], side="right")) if len(bad) else none

    def _groups(self, labels: Labels) -> frozenset[int]:
        return frozenset(np.unique(self.coupling.group_of[labels.numpy()]).tolist()) - {-1}

    def _blamed(
        self, tracer: Tracer, raised: Exception | None, whole: Record, stays: Index, training: bool
    ) -> Finding | None:
        """Hold what the operator that failed was given or, failing that, what makes it fail."""
        if raised is None:
            return None
        shifted = self._first_shift(tracer.record, whole, stays)
        if shifted is not None:
            module, line = self._locate("course", shifted + 1, stays, training)
        else:
            module, line = tracer.failed_in or "the model", _line_of(raised)
        given = [] if tracer.running is None else tracer.running.given
        labels = [along for tensor in given for along in tracer.all_labels(tensor).values()]
        groups = self._groups(torch.cat(labels)) if labels else frozenset()
        if not groups:
            groups = self._culprits(lambda some: self._run_with(some, training)[1] is not None)
        return Finding(groups, module, f"{_WHY}{line}")

    def _astray(self, expected: list, course: list, training: bool) -> Finding:
        """Find the groups whose size changes what the network does, or a number that it computes with."""
        at = next((i for i, (a, b) in enumerate(zip(expected, course, strict=False)) if a != b), len(course) - 1)
        everything = range(len(self.coupling.groups))
        module, line = self._locate("course", at + 1, self._stays(everything), training)
        groups = self._culprits(lambda some: self._run_with(some, training)[0].record.course != expected)
        return Finding(groups, module, f"computes with the number of its channels{line}")

    def _run_with(self, groups: list[int], training: bool) -> tuple[Tracer, Exception | None]:
        return self._run(Tracer(self.tables, self.known), self._stays(groups), training)

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
