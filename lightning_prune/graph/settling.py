"""Settling: groups are formed, tried out on smaller networks, and what does not work is unprunable, until all works."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial

import numpy as np

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.costs import COSTS
from lightning_prune.graph.explanation import Finding
from lightning_prune.graph.fitting import OF_ATTENTION, Fitting, widths_to_tie
from lightning_prune.graph.groups import Grouping, form_groups
from lightning_prune.graph.memory import Memory
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known, Note, Record, Tie
from lightning_prune.graph.relations import Relations, frozen_channels
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward
from lightning_prune.graph.sheets import Sheet, is_pair, joined_groups
from lightning_prune.graph.slots import module_of
from lightning_prune.graph.steps import StepRun
from lightning_prune.graph.tracer import Tracer
from lightning_prune.graph.trial import Fitted, Pruned, Shrinking, TrialRunner
from lightning_prune.graph.verification import Verifier
from lightning_prune.pruning_plan import PlannedGroup

__all__ = ["Network", "Search", "matches_any"]

_BESIDE = "is not run by forward, so that pruning it would save nothing there"
_COMPLEX = "has complex numbers, which no criterion scores"
_OTHER = "other "  # before the names of groups of another sheet


class _TrainingMode(Enum):
    """What is known of a network in training mode."""

    NOT_OBSERVED = auto()
    OBSERVED = auto()
    UNTRACEABLE = auto()  # it takes other inputs to be trained, such as targets


_Verify = Callable[[Grouping, "_Observed"], "_Verdict"]


@dataclass(frozen=True)
class _Observed:
    """What the full network showed in evaluation and, where it was observed, in training mode, and in steps by name."""

    evaluation: Record
    training: Record | None
    steps: Mapping[str, Record] = field(default_factory=dict)

    def of_forward(self) -> Record:
        """Return what both modes showed about channels, with the costs in evaluation mode."""
        joined = Record(costs=self.evaluation.costs)
        joined.extend(self.evaluation)
        if self.training is not None:
            joined.extend(self.training)
        return joined

    def joined(self) -> Record:
        """Return what both modes and all steps showed about channels, with the costs in evaluation mode."""
        joined = self.of_forward()
        not_mask_exact = list(joined.not_mask_exact)  # which is about what the network returns
        for record in self.steps.values():
            joined.extend(record)
        joined.not_mask_exact = not_mask_exact
        return joined


@dataclass(frozen=True)
class _Verdict:
    """Whether groups work.

    Attributes:
        works: Whether they do.
        findings: What does not; nothing is found where training mode was not observed.
    """

    works: bool
    findings: Sequence[Finding] = ()


@dataclass(frozen=True)
class Network:
    """What is traced.

    Attributes:
        forward: The forward pass.
        ignored: Patterns of names of modules whose channels are not to be pruned.
        steps: Makes what else runs the network.
        relations: What is known of its submodules.
    """

    forward: Forward
    ignored: Sequence[str]
    steps: Callable[[], list[StepRun]]
    relations: Relations


class Search:
    """Form groups, try them out, and mark as unprunable what does not work, until everything works.

    Args:
        network: What is traced.
        known: What has been found out about it.
        other: The other sheet, if the network is seen twice.
        beside: Whether the groups of that have been tried out, and are pruned whenever groups of this one are.

    Attributes:
        forward: The forward pass.
        known: What has been found out about the network.
        found_unprunable: The channels that did not work.
        found_beside_attention: Those of them that are none of attention, of which another sheet would show the same.
        training_mode: What is known of training mode.
        untraced: Why steps could not be traced, by name.
        frozen: The frozen submodules that keep their channels.
        in_training: What a pass in training mode showed, of the full network or of a smaller one, if there was one.
        verified: The groups that work in the forward pass.
        not_mask_exact: What a smaller network showed in training mode, where that was not observed.
        resized: Names of the modules that compute with their attributes, so that these are left alone.
        splitting: Names of the modules that something did not work in, which are given the sizes to split axes by.
        tied_widths: The channels that are as many as others, since one number of code is the width of both.
    """

    def __init__(
        self,
        network: Network,
        known: Known,
        other: Sheet | None = None,
        beside: bool = False,
    ) -> None:
        self.network = network
        self.forward = network.forward
        self.steps = network.steps()
        self.known = known
        self.other = other
        self.beside = beside
        self.tables = OperatorTables(RULES, COSTS)
        self.tables_without_costs = OperatorTables(RULES, {})
        self.found_unprunable: list[Note] = []
        self.found_beside_attention: list[Note] = []
        self.training_mode = _TrainingMode.NOT_OBSERVED
        self.untraced: dict[str, str] = {}
        self.frozen: list[str] = []
        self.in_training: Record | None = None
        self.verified: dict[str, Group] | None = None
        self.not_mask_exact: Sequence[Note] = ()
        self.resized: frozenset[str] = frozenset()
        self.splitting: frozenset[str] = frozenset()
        self.tied_widths: list[Tie] = []

    def observe(self) -> Record:
        """Return what the full network shows in evaluation mode."""
        return self._observe_evaluation()

    def first_sheet(self, evaluation: Record) -> Sheet:
        """Return the groups before any is tried out.

        Args:
            evaluation: What the full network showed in evaluation mode.
        """
        grouping = self._form_groups(_Observed(evaluation, None))
        return Sheet(
            grouping,
            evaluation,
            grouping.names,
        )

    def settle(self, evaluation: Record) -> tuple[Sheet, Record]:
        """Return the groups that work, and all that the full network showed.

        Args:
            evaluation: What it showed in evaluation mode.
        """
        observed = _Observed(evaluation, None)
        grouping, observed = self._settle(observed, self._verify)
        if self.steps:
            observed = replace(observed, steps=self._observe_steps(observed.evaluation))
            grouping, observed = self._settle(observed, self._verify_steps)
        return Sheet(
            grouping,
            observed.evaluation,
            grouping.names,
        ), observed.joined()

    def _settle(self, observed: _Observed, verify: _Verify) -> tuple[Grouping, _Observed]:
        """Return the groups that work, and what the full network has shown."""
        while True:
            grouping = self._form_groups(observed)
            verdict = verify(grouping, observed)
            if verdict.works:
                self.verified = grouping.groups
                grouping.add_not_mask_exact(self.not_mask_exact)
                return grouping, observed
            if not verdict.findings:  # perhaps training mode only does more
                observed = replace(observed, training=self._observe_training())
            elif self._learn_which_axes_shrink(verdict.findings):  # the groups may be right
                observed = self._observe_again(observed.steps)
            elif not self._runs_otherwise(
                grouping,
                observed,
                verdict.findings,
            ) and not self._ties_widths(
                grouping,
                observed.evaluation,
                verdict.findings,
            ):
                self._note_unprunable(grouping, verdict.findings)

    def _note_unprunable(self, grouping: Grouping, findings: Sequence[Finding]) -> None:
        groups = list(grouping.groups.values())
        for finding in findings:
            note = finding.note(grouping)
            self.found_unprunable.append(note)
            if not any(groups[number].kind in OF_ATTENTION for number in finding.groups):
                self.found_beside_attention.append(note)

    def _runs_otherwise(
        self,
        grouping: Grouping,
        observed: _Observed,
        findings: Sequence[Finding],
    ) -> bool:
        """Tell whether modules in which something did not work run in another way now."""
        seen = (
            grouping,
            observed,
            findings,
        )
        return self._leaves_attributes_alone(*seen) or self._gives_sizes(*seen)

    def _gives_sizes(
        self,
        grouping: Grouping,
        observed: _Observed,
        findings: Sequence[Finding],
    ) -> bool:
        """Give modules in which something did not work the sizes to split axes by, else leave their attributes alone.

        Returns:
            Whether any of them runs in another way now.
        """
        before = self._fitting(grouping, observed.evaluation)[0].adaptations()
        found = {finding.module for finding in findings}
        found &= set(self.forward.module_names)  # not the whole model, which keeps its class
        if found <= self.splitting:  # sizes may be computed from attributes
            self.resized |= found
        self.splitting |= found
        after = self._fitting(grouping, observed.evaluation)[0].adaptations()
        return any(after.get(name) != before.get(name) for name in found)

    def _leaves_attributes_alone(
        self,
        grouping: Grouping,
        observed: _Observed,
        findings: Sequence[Finding],
    ) -> bool:
        """Leave the attributes of modules alone in which something did not work, and have them run with other sizes.

        Returns:
            Whether any of them has attributes that were to follow channels of attention.
        """
        fitting = self._fitting(grouping, observed.evaluation)[0]
        adaptations = fitting.adaptations()
        found = set()
        for name in {finding.module for finding in findings} & adaptations.keys():
            groups = {group for _, count in adaptations[name].numbers for group in count.groups}
            if any(fitting.groups[group].kind in OF_ATTENTION for group in groups):
                found.add(name)
        self.resized |= found
        return bool(found)

    def _ties_widths(
        self,
        grouping: Grouping,
        evaluation: Record,
        findings: Sequence[Finding],
    ) -> bool:
        """Let groups be as wide as each other in which something did not work, where one number of code is their width.

        Returns:
            Whether there are any.
        """
        found = frozenset().union(*(finding.groups for finding in findings))
        modules = {finding.module for finding in findings}
        places = [place for place in evaluation.shapings if place.module in modules]
        ties = widths_to_tie(
            places,
            grouping,
            found,
        )
        self.tied_widths += ties
        return bool(ties)

    def _learn_which_axes_shrink(self, findings: Sequence[Finding]) -> bool:
        """Let the outermost axis of a split become shorter where the innermost one did not work.

        Returns:
            Whether there was such a split that has not been learnt about before.
        """
        known = self.known.shrinking_axis
        found = [finding.site for finding in findings]
        sites = {site for site in found if site is not None and site not in known}
        if sites:
            self.known = replace(self.known, shrinking_axis={**known, **dict.fromkeys(sites, 0)})
        return bool(sites)

    # -- what follows the groups -------------------------------------------------------------------------------------

    def runs_with_single_heads(self, sheet: Sheet) -> bool:
        """Tell whether the network runs with one head where it has two, which nothing else has tried.

        Args:
            sheet: The groups that work.
        """
        fitting, beside = self._fitting(sheet.grouping, sheet.record)
        pairs = [name for name, group in fitting.groups.items() if is_pair(group)]
        if not pairs:
            return True
        for name in pairs:
            group = fitting.groups[name]
            beside[name] = PlannedGroup(group.size, (0,), group.slices)
        fitted = Fitted(fitting.adaptations(), beside)
        runner = TrialRunner(self.forward, sheet.grouping, self.tables_without_costs, self.known, fitted)
        trial = runner.run(Shrinking([], Pruned.FIRST, training=False), sheet.record)
        return not trial.failures

    def _fitted(self, grouping: Grouping, evaluation: Record) -> Fitted:
        """Return what is done in a trial beside pruning groups."""
        fitting, beside = self._fitting(grouping, evaluation)
        return Fitted(fitting.adaptations(), beside)

    def _fitting(self, grouping: Grouping, evaluation: Record) -> tuple[Fitting, dict[str, PlannedGroup]]:
        """Return what finds out what follows the groups, and the groups of the other sheet that are pruned too."""
        own = Sheet(grouping, evaluation, grouping.names)
        if self.other is None:
            return Fitting([own], grouping.groups, self.resized, self.splitting), {}
        if not self.beside:
            others = {_OTHER + name: group for name, group in self.other.grouping.groups.items()}
            other = replace(self.other, names=list(others))
            groups = {**grouping.groups, **others}
            return Fitting([other, own], groups, self.resized, self.splitting), {}
        groups, names = joined_groups(grouping, self.other)
        beside = {}
        for name in names:
            if name and name not in grouping.groups and not is_pair(groups[name]):
                beside[name] = _half(groups[name])
        other = replace(self.other, names=names)
        return Fitting([own, other], groups, self.resized, self.splitting), beside

    # -- observing the full network --------------------------------------------------------------------------------

    def _observe_evaluation(self) -> Record:
        return self._learn_from(self.forward.observe(self._make_tracer, training=False))

    def _observe_training(self) -> Record | None:
        try:
            training = self.forward.observe(self._make_tracer, training=True)
        except ValueError:
            self.training_mode = _TrainingMode.UNTRACEABLE
            return None
        self.training_mode = _TrainingMode.OBSERVED
        self.in_training = training.record
        return self._learn_from(training)

    def _observe_again(self, steps: Mapping[str, Record]) -> _Observed:
        """Observe both modes, and steps if they have been observed before, now that more is known."""
        observed = _Observed(self._observe_evaluation(), self._observe_training())
        return replace(observed, steps=self._observe_steps(observed.evaluation)) if steps else observed

    def _observe_steps(self, evaluation: Record) -> dict[str, Record]:
        """Return what the steps show that can be traced."""
        records = {}
        for run in list(self.steps):
            run.memory = self._memory(evaluation, run.step.training)
            try:
                tracer = run.observe(
                    partial(
                        Tracer,
                        self.tables_without_costs,
                        self.known,
                    ),
                    run.step.training,
                )
            except Exception as raised:
                self.untraced[run.step.name] = f"{type(raised).__name__}: {raised}"
                self.steps.remove(run)
            else:
                records[run.step.name] = self._learn_from(tracer)
        return records

    def _memory(self, evaluation: Record, training: bool) -> Memory | None:
        """Return what modules need not run again for, in one of the modes."""
        if not self.forward.keeps_nothing:
            return None
        if not training:
            return Memory(evaluation)
        return Memory(evaluation, self.in_training) if self.in_training is not None else None

    def _learn_from(self, tracer: Tracer) -> Record:
        """Take note of the grouped convolutions of a full network, and return what else it showed."""
        self.known = replace(self.known, grouped=self.known.grouped | tracer.grouped)
        return tracer.record

    def _make_tracer(self) -> Tracer:
        return Tracer(self.tables, self.known)

    # -- forming groups --------------------------------------------------------------------------------------------

    def _form_groups(self, observed: _Observed) -> Grouping:
        record = observed.joined()
        record.unprunable += self._ignored_channels(record)
        record.unprunable += self._complex_channels()
        record.ties += self.network.relations.ties(self.forward.labelled)
        record.ties += self.tied_widths
        self.frozen = self.network.relations.kept_whole(self.forward.labelled, record)
        record.unprunable += frozen_channels(self.forward.labelled, self.frozen)
        record.unprunable += self.found_unprunable
        return form_groups(
            self.forward.labelled,
            record,
            self._prunable_elsewhere(),
        )

    def _prunable_elsewhere(self) -> np.ndarray | None:
        return self.other.grouping.group_of >= 0 if self.other is not None and self.beside else None

    def _ignored_channels(self, record: Record) -> list[Note]:
        notes: list[Note] = []
        for labels in record.out_slices:
            module = self.forward.labelled.module_of(labels)
            matching = [pattern for pattern in self.network.ignored if matches_any(pattern, _with_parents(module))]
            notes.extend(
                Note(
                    labels,
                    module,
                    f"is ignored by the pattern {pattern!r}",
                )
                for pattern in matching
            )
        return notes

    def _complex_channels(self) -> list[Note]:
        notes = []
        for name, tensor in self.forward.tensors.items():
            if tensor.is_complex():
                labels_by_axis = self.forward.labelled.labels(name)
                notes += [
                    Note(
                        labels,
                        module_of(name),
                        _COMPLEX,
                    )
                    for labels in labels_by_axis.values()
                ]
        return notes

    # -- trying them out -------------------------------------------------------------------------------------------

    def _verifier(
        self,
        forward: Forward,
        grouping: Grouping,
        fitted: Fitted,
    ) -> Verifier:
        return Verifier(
            forward,
            grouping,
            self.tables_without_costs,
            self.known,
            fitted,
        )

    def _verify(self, grouping: Grouping, observed: _Observed) -> _Verdict:
        """Try groups, beside those of the other sheet and alone: sizes of both can be right together by chance.

        Beside them it is told apart which size is that of which group, which holds alone too.
        """
        if not grouping.groups:
            return _Verdict(works=True)
        fitted = self._fitted(grouping, observed.evaluation)
        beside = self._verifier(
            self.forward,
            grouping,
            fitted,
        )
        verdict = self._verify_beside(beside, observed)
        if not verdict.works or not fitted.beside:
            return verdict
        alone = self._verifier(
            self.forward,
            grouping,
            replace(fitted, beside={}),
        )
        trial = alone.first_trial(training=False, full=observed.evaluation)
        findings = alone.findings_at_once(trial)
        return _Verdict(works=not findings, findings=findings)

    def _verify_beside(self, verifier: Verifier, observed: _Observed) -> _Verdict:
        """Try groups in training mode, and in evaluation mode unless that has just been seen to do the same."""
        if self.training_mode is _TrainingMode.NOT_OBSERVED:
            return self._verify_unobserved(verifier, observed.evaluation)
        if self.training_mode is _TrainingMode.OBSERVED:
            trial = verifier.first_trial(training=True, full=observed.training)
            findings = verifier.findings(trial)
            if findings:
                return _Verdict(works=False, findings=findings)
            if trial.covers(observed.evaluation):
                return _Verdict(works=True)
        return self._verify_in_evaluation(verifier, observed.evaluation)

    def _verify_unobserved(self, verifier: Verifier, evaluation: Record) -> _Verdict:
        """Try groups in training mode without knowing what the full network does in it."""
        trial = verifier.first_trial(training=True, full=None)
        self.in_training = trial.record
        self.not_mask_exact = trial.record.not_mask_exact
        cuts_as_often = len(trial.record.cut) == len(evaluation.cut)
        if not verifier.looks_right(trial) or not cuts_as_often:
            return _Verdict(works=False)
        # Where channels are cut is compared with what the full network does in the same mode.
        if not verifier.cuts(evaluation) and trial.covers(evaluation):
            return _Verdict(works=True)
        in_evaluation = verifier.first_trial(training=False, full=evaluation)
        return _Verdict(verifier.works(in_evaluation))

    def _verify_steps(self, grouping: Grouping, observed: _Observed) -> _Verdict:
        """Try groups in the forward pass, unless it is known that they work there, and in each step."""
        beside = _beside_forward(grouping, observed.of_forward())
        if beside:
            return _Verdict(works=False, findings=beside)
        if grouping.groups != self.verified:
            verdict = self._verify(grouping, observed)
            if not verdict.works:
                return verdict
        for run in self.steps if grouping.groups else ():
            verifier = self._verifier(
                run,
                grouping,
                self._fitted(grouping, observed.evaluation),
            )
            trial = verifier.first_trial(run.step.training, observed.steps[run.step.name])
            findings = verifier.findings(trial)
            if findings:
                return _Verdict(works=False, findings=findings)
        return _Verdict(works=True)

    def _verify_in_evaluation(self, verifier: Verifier, evaluation: Record) -> _Verdict:
        trial = verifier.first_trial(training=False, full=evaluation)
        findings = verifier.findings(trial)
        return _Verdict(works=not findings, findings=findings)


def _beside_forward(grouping: Grouping, of_forward: Record) -> list[Finding]:
    """Return the groups that no operator of the forward pass has to do with."""
    findings = []
    for number, group in enumerate(grouping.groups.values()):
        if not any(one.tensor in of_forward.used for one in group.slices):
            findings.append(
                Finding(
                    frozenset([number]),
                    group.name,
                    _BESIDE,
                )
            )
    return findings


def _half(group: Group) -> PlannedGroup:
    """Return about half of the channels of a group, with the first: labels are those of the first head."""
    kept = tuple(range(0, group.size, 2))
    if len(kept) < group.least:
        kept = tuple(range(group.least))
    return PlannedGroup(group.size, kept, group.slices)


def matches_any(pattern: str, names: Sequence[str]) -> bool:
    """Tell whether a pattern such as ``"layer1.*"`` matches any of some names."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _with_parents(name: str) -> list[str]:
    """Return the names of a module and of all that it is in: "a", "a.b" and "a.b.c" for "a.b.c"."""
    steps = name.split(".")
    return [".".join(steps[: length + 1]) for length in range(len(steps))]
