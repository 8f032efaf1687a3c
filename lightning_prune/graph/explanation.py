"""Explanation of what goes wrong in a smaller network: the groups, the module and the line of code."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lightning_prune.graph.comparison import Expectations
from lightning_prune.graph.frames import SourceLine
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import CallKey, Note, OperatorStep, SplitSite
from lightning_prune.graph.trial import Entries, Failure, Place, Trial, TrialRunner, unlike_subsets

__all__ = ["Explanation", "Finding"]

_RELIES = "relies on the number of its channels"
_COMPUTES = "computes with the number of its channels"
_FOR_VALUES = "does something else for other values"
_NEARBY = 20  # operators, about those of an attention
_MANY, _PARTS = 16, 4  # groups, that are tried in parts


@dataclass(frozen=True)
class Finding:
    """Something that does not hold in a smaller network.

    Attributes:
        groups: Numbers of the groups that it concerns.
        module: Name of the module that relies on them.
        why: How, with the line of code.
        site: The line of code that splits an axis, if the trouble is there.
    """

    groups: frozenset[int]
    module: str
    why: str
    site: SplitSite | None = None

    def note(self, grouping: Grouping) -> Note:
        """Return it as a reason why the groups are unprunable."""
        is_concerned = np.isin(grouping.group_of, list(self.groups))
        labels = np.flatnonzero(is_concerned)
        return Note(torch.from_numpy(labels), self.module, self.why)


class Explanation:
    """Explain a trial by comparing it with the full network.

    Args:
        runner: Runs more trials where one does not tell.
        expectations: What the groups lead to expect.
        trial: The trial, which knows what the full network showed.
    """

    def __init__(self, runner: TrialRunner, expectations: Expectations, trial: Trial) -> None:
        self.runner = runner
        self.expectations = expectations
        self._groups_of = expectations.groups_of
        self.trial = trial
        self.full = trial.full
        self.record = trial.record

    def findings(self) -> list[Finding]:
        """Return what went wrong; nothing if all is as in the full network."""
        new_tie = self.expectations.first_new_tie(self.record.ties, self.trial.kept)
        unprunable = self.expectations.first_unprunable(self.record.unprunable)
        failures = self._failures_before(new_tie, unprunable)
        if failures:
            return self._explain_failures(failures)
        if new_tie is not None:
            return self._explain_tie(new_tie)
        if unprunable is not None:
            return self._explain_unprunable(unprunable)
        if self.record.operator_trace != self.full.operator_trace:
            return self._explain_other_operators()
        shifted = self.trial.first_shift(0, len(self.full.operator_trace))
        if shifted is not None:
            return self._explain_shift(shifted)
        return []

    def is_needed(self) -> bool:
        """Tell whether anything went wrong, without a search for the cause."""
        if self.trial.failures or not self.expectations.are_met(self.record, self.trial.kept):
            return True
        if self.record.operator_trace != self.full.operator_trace:
            return True
        return self.trial.first_shift(0, len(self.full.operator_trace)) is not None

    def _failures_before(self, new_tie: int | None, unprunable: int | None) -> list[Failure]:
        """Return the failures that may not only be due to channels having met others than their own before."""
        failures = self.trial.failures
        if new_tie is not None:
            failures = [failure for failure in failures if failure.ties <= new_tie]
        if unprunable is not None:
            failures = [failure for failure in failures if failure.unprunable <= unprunable]
        return failures

    # -- channels at wrong places ----------------------------------------------------------------------------------

    def _explain_tie(self, number: int) -> list[Finding]:
        """Name the first place where channels meet others than their own, and those like it."""
        tie = self.record.ties[number]
        groups = self._groups_of(tie.sides)
        site = self.trial.ties_of_splits.get(number)
        return self._explain_misplaced(groups, Entries.TIES, number, site)

    def _explain_unprunable(self, number: int) -> list[Finding]:
        """Name the first place where a rule says of channels that they cannot be pruned, and those like it."""
        note = self.record.unprunable[number]
        groups = self._groups_of([note.labels])
        return self._explain_misplaced(groups, Entries.UNPRUNABLE, number)

    def _explain_misplaced(
        self, groups: frozenset[int], entries: Entries, number: int, site: SplitSite | None = None
    ) -> list[Finding]:
        """Name the first operator that gives channels a wrong place or, if none does, where an entry was made."""
        shifted = self.trial.first_shift(0, len(self.record.operator_trace))
        if shifted is not None:
            entries, number = Entries.OPERATORS, shifted
        place = self.trial.place(entries, number)
        first = Finding(groups, place.module, f"{_RELIES}{place.line}", site)
        if entries is Entries.TIES:
            return self._with_alike(first, place.line, self._tied())
        return self._with_alike(first, place.line, self._shifted(number))

    def _tied(self) -> Iterator[tuple[Place, frozenset[int]]]:
        """Yield where channels meet others than their own, and the groups of these."""
        for number in self.expectations.new_ties(self.record.ties, self.trial.kept):
            place = self.trial.place(Entries.TIES, number)
            yield place, self._groups_of(self.record.ties[number].sides)

    def _shifted(self, start: int) -> Iterator[tuple[Place, frozenset[int]]]:
        """Yield the operators from some number on that give channels a wrong place, and the groups of these."""
        number = self.trial.first_shift(start, len(self.full.operator_trace))
        while number is not None:
            if self.trial.ran(number):
                place = self._place(number)
                yield place, self._groups_of(place.given)
            number = self.trial.first_shift(number + 1, len(self.full.operator_trace))

    def _with_alike(
        self,
        first: Finding,
        line: SourceLine,
        others: Iterable[tuple[Place, frozenset[int]]],
    ) -> list[Finding]:
        """Return a finding, and what the same line of code does to channels of other groups in other modules.

        These have not been given a wrong place before, since nothing that went wrong has to do with their groups.

        Args:
            first: What goes wrong first.
            line: Where.
            others: What goes wrong later, and with which groups.
        """
        found = {first.module: first}
        known = first.groups
        for place, groups in others:
            if place.line != line or not groups:
                continue
            if known.isdisjoint(groups):
                alike = replace(
                    first,
                    groups=groups,
                    module=place.module,
                )
                found.setdefault(place.module, alike)
                known |= groups
        return list(found.values())

    def _explain_shift(self, shifted: int) -> list[Finding]:
        """Name the channels that an operator cuts at a wrong place, and those like it."""

        def still_shifts(trial: Trial) -> bool:
            return trial.first_shift(0, shifted + 1) is not None

        place = self.trial.place(Entries.OPERATORS, shifted)
        groups = self._groups_of(place.given) or self._culprits(still_shifts, shifted)
        first = Finding(groups, place.module, f"{_RELIES}{place.line}")
        return self._with_alike(first, place.line, self._shifted(shifted + 1))

    def _explain_other_operators(self) -> list[Finding]:
        """Find the groups whose size changes what the network does, or a number that it computes with."""
        numbers = self._numbers_of_groups()
        if not numbers:
            return [self._explain_first_other_operator()]
        findings = []
        for group, number in numbers.items():
            place = self.trial.place(Entries.OPERATORS, number)
            what = f"{_COMPUTES}{place.line}"
            findings.append(Finding(frozenset([group]), place.module, what))
        return findings

    def _numbers_of_groups(self) -> dict[int, int]:
        """Return, by group, the first operator that computes with the size of what it is given, and of nothing else.

        Of each line of code the groups of one module are tried: each is smaller in other trials than each other one,
        and what differs just there is due to it alone.
        """
        likely: dict[int, int] = {}
        for number in sorted(self._operators_with_other_numbers(self.trial) or ()):
            groups = self._groups_at(number)
            if len(groups) == 1:
                (group,) = groups
                likely.setdefault(group, number)
        tried = self._in_first_modules(likely)
        wrong = self._not_alone(tried)
        wrong_lines = {self._place(tried[group]).line for group in wrong}
        right = {group: number for group, number in tried.items() if group not in wrong}
        for group, number in likely.items():
            line = self._place(number).line
            if group not in tried and line not in wrong_lines:
                right[group] = number
        return right

    def _groups_at(self, operator: int) -> frozenset[int]:
        """Return the groups that an operator was given or, if it makes a number of code a tensor, were made last."""
        groups = self._groups_of(self._place(operator).given)
        before = self.full.output_labels[max(operator - _NEARBY, 0) : operator]
        for outputs in reversed(before):
            if groups:
                break
            groups = self._groups_of(list(outputs.values()))
        return groups

    def _place(self, operator: int) -> Place:
        return self.trial.place(Entries.OPERATORS, operator)

    def _in_first_modules(self, likely: Mapping[int, int]) -> dict[int, int]:
        """Return the groups whose operator runs in the first module that runs its line of code."""
        first_module: dict[SourceLine, str] = {}
        found = {}
        for group, number in likely.items():
            place = self._place(number)
            first = first_module.setdefault(place.line, place.module)
            if first == place.module:
                found[group] = number
        return found

    def _not_alone(self, likely: Mapping[int, int]) -> set[int]:
        """Return the groups whose operator does not compute with another number just where they are smaller."""
        wrong: set[int] = set()
        if not likely:
            return wrong
        for smaller in unlike_subsets(sorted(likely)) or [list(likely)]:
            differing = self._operators_with_other_numbers(self._try(smaller)) or set()
            for group, number in likely.items():
                if (number in differing) != (group in smaller):
                    wrong.add(group)
        return wrong

    def _operators_with_other_numbers(self, trial: Trial) -> set[int] | None:
        """Return the operators that compute with other numbers; None if there are others, or more."""
        expected = self.full.operator_trace
        found = trial.record.operator_trace
        if len(found) != len(expected):
            return None
        differing = set()
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one[0] is not other[0]:
                return None
            if one != other:
                differing.add(number)
        return differing

    def _explain_first_other_operator(self) -> Finding:
        """Find the groups that make the first operator another one."""
        expected = self.full.operator_trace
        found = self.record.operator_trace

        def still_differs(trial: Trial) -> bool:
            return trial.record.operator_trace != expected

        number = _first_difference(expected, found)
        place = self.trial.place(Entries.OPERATORS, number)
        if self._is_by_values(still_differs):
            groups = frozenset(self.trial.shrinking.groups)
            return Finding(groups, place.module, f"{_FOR_VALUES}{place.line}")
        groups = self._culprits(still_differs, number)
        return Finding(groups, place.module, f"{_COMPUTES}{place.line}")

    # -- failures --------------------------------------------------------------------------------------------------

    def _explain_failures(self, failures: Sequence[Failure]) -> list[Finding]:
        """Find what the operators that failed were given or, where Python code failed, what makes it fail."""
        suspects = self._suspects(failures)
        findings = []
        resumed = 0
        for failure in failures:
            shifted = self.trial.first_shift(resumed, failure.at)
            if shifted is not None:
                findings += self._explain_shift(shifted)
            elif suspects[failure.key]:
                findings.append(_finding_of_failure(failure, suspects[failure.key]))
            resumed = failure.resumed
        return findings or [self._search_for_cause(failures[0])]

    def _suspects(self, failures: Sequence[Failure]) -> dict[CallKey, frozenset[int]]:
        """Return, for each failure, the groups that may be its cause.

        That is what the operator that failed was given. Where Python code failed, it is most often what the last
        operator returned, or what the module was given; further trials, in which nothing else is smaller, tell.
        """
        suspects, of_last_output, of_module_inputs = {}, {}, {}
        for failure in failures:
            suspects[failure.key] = self._groups_of(failure.given)
            of_last_output[failure.key] = self._groups_of(failure.last_output)
            of_module_inputs[failure.key] = self._groups_of(failure.module_inputs)
        for cause in (of_last_output, of_module_inputs):
            likely = {key: groups for key, groups in cause.items() if not suspects[key]}
            groups = frozenset().union(*likely.values())
            if not groups:
                continue
            trial = self._try(sorted(groups))
            for failure in trial.failures:
                key = failure.key
                if key in likely:
                    suspects[key] = likely[key]
        return suspects

    def _search_for_cause(self, failure: Failure) -> Finding:
        """Search for what makes code fail that gives no hint."""

        def still_fails(trial: Trial) -> bool:
            return bool(trial.failures)

        return _finding_of_failure(failure, self._culprits(still_fails, failure.at))

    # -- more trials -----------------------------------------------------------------------------------------------

    def _is_by_values(self, goes_wrong: Callable[[Trial], bool]) -> bool:
        """Tell whether any part of many groups makes it go wrong on real data: that is what they hold, not how many.

        To search for one after the other would take as many searches as there are groups.
        """
        groups = self.trial.shrinking.groups
        if not self.runner.forward.real or len(groups) < _MANY:
            return False
        return all(goes_wrong(self._try(groups[start::_PARTS])) for start in range(_PARTS))

    def _culprits(self, goes_wrong: Callable[[Trial], bool], number: int) -> frozenset[int]:
        """Narrow down the groups that must be small for something to go wrong at some operator, by halves."""
        suspects = self.trial.shrinking.groups
        nearby = self._groups_before(number)
        if nearby and goes_wrong(self._try(nearby)):
            suspects = nearby
        while len(suspects) > 1:
            middle = len(suspects) // 2
            if goes_wrong(self._try(suspects[:middle])):
                suspects = suspects[:middle]
            elif goes_wrong(self._try(suspects[middle:])):
                suspects = suspects[middle:]
            else:
                break  # it takes some of both
        return frozenset(suspects)

    def _groups_before(self, number: int) -> list[int]:
        """Return the groups that the last operators before some operator gave their outputs."""
        outputs = self.full.output_labels[max(number - _NEARBY, 0) : number]
        groups = self._groups_of([labels for output in outputs for labels in output.values()])
        return sorted(groups.intersection(self.trial.shrinking.groups))

    def _try(self, groups: Sequence[int]) -> Trial:
        """Run the same trial again with only some groups smaller."""
        shrinking = replace(self.trial.shrinking, groups=groups)
        return self.runner.run(shrinking, self.full)


def _finding_of_failure(failure: Failure, groups: frozenset[int]) -> Finding:
    why = f"{_RELIES}{failure.line}"
    return Finding(groups, failure.key.module, why)


def _first_difference(expected: Sequence[OperatorStep], found: Sequence[OperatorStep]) -> int:
    """Return the number of the first operator that differs; the last one found if it is only the number of them."""
    for number, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return number
    return len(found) - 1
