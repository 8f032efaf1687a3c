"""Tracing a model into a channel graph that has been tried out on smaller networks."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.graph.costs import COSTS
from lightning_prune.graph.entry import Step
from lightning_prune.graph.explanation import Finding
from lightning_prune.graph.groups import Grouping, form_groups
from lightning_prune.graph.memory import Memory
from lightning_prune.graph.nearest import nearest_names
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import CostTerm, Known, Note, Record
from lightning_prune.graph.relations import NO_RELATIONS, Relations, frozen_channels
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward
from lightning_prune.graph.slots import module_of
from lightning_prune.graph.steps import StepRun
from lightning_prune.graph.terms import cost_terms, take_out
from lightning_prune.graph.tracer import Tracer
from lightning_prune.graph.unnamed import name_the_rest
from lightning_prune.graph.verification import Verifier
from lightning_prune.progress import progress

__all__ = ["trace"]

_BESIDE = "is not run by forward, so that pruning it would save nothing there"
_COMPLEX = "has complex numbers, which no criterion scores"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    module: str = "",
    ignore: Sequence[str] = (),
    steps: Sequence[Step] = (),
    relations: Relations = NO_RELATIONS,
) -> ChannelGraph:
    """Find out which channels of a model can only be pruned together, which cannot be pruned, and why.

    The model's forward pass runs on tensors without data, and then once more with fewer channels, to see that nothing
    in it relies on their number, in evaluation and in training mode. Where data is needed (control flow that depends
    on values) the example inputs are run for real. The model is as it was afterwards: mode, parameters, buffers,
    hooks, gradients and random state.

    Args:
        model: Any module; a model that has been pruned before is traced in its original shape.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a dictionary of named
            ones; a `Step` where a model has no ``forward``. Costs are counted for these inputs.
        module: Dotted name of the submodule to trace, whose ``forward`` then takes the example inputs; default the
            model itself.
        ignore: Patterns (``"layer1.*"``) of names of modules whose channels are not to be pruned.
        steps: Methods of the model that run it in other ways, such as one that trains it: what these do with channels
            counts too. One that cannot be traced is in ``untraced`` of the graph.
        relations: What is known of its submodules: which are frozen, and which follow others.

    Returns:
        The graph.

    Raises:
        ValueError: If the inputs do not fit, a pattern matches no module, ``module`` names no submodule, or the model
            is quantized, not initialised, or spread over several devices.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> graph.groups["0"].size
        8
        >>> graph.unprunable
        {'3': Unprunable(channels=10, reason='3: is an output of the network')}
    """
    with progress(f"Tracing {type(model).__name__}"), as_written():
        forward = Forward(model, module, example_inputs)
        forward.outside = relations.outside
        patterns = _checked_patterns(ignore, forward.module_names)
        search = _Search(forward, patterns, [StepRun(forward, model, step) for step in steps], relations)
        grouping, operations = search.settle()
        terms = cost_terms(forward, grouping, operations)
    unprunable = dict(grouping.unprunable)
    return ChannelGraph(
        model,
        grouping.groups,
        unprunable,
        forward.shapes,
        terms,
        module,
        example_inputs,
        untraced=search.untraced,
        frozen=take_out(terms, search.frozen),
    )


def _checked_patterns(ignore: Sequence[str], module_names: Sequence[str]) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not _matches_any(pattern, module_names):
            known = nearest_names(pattern, module_names)
            raise ValueError(f"The ignore pattern {pattern!r} matches no module of the model; {known}.")
    return patterns


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


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


class _Search:
    """Form groups, try them out, and mark as unprunable what does not work, until everything works.

    Args:
        forward: The forward pass.
        ignored: Patterns of names of modules whose channels are not to be pruned.
        steps: What else runs the network.
        relations: What is known of its submodules.

    Attributes:
        known: What has been found out about the network.
        found_unprunable: The channels that did not work.
        training_mode: What is known of training mode.
        untraced: Why steps could not be traced, by name.
        frozen: The frozen submodules that keep their channels.
        in_training: What a pass in training mode showed, of the full network or of a smaller one, if there was one.
        verified: The groups that work in the forward pass.
        not_mask_exact: What a smaller network showed in training mode, where that was not observed.
    """

    def __init__(
        self,
        forward: Forward,
        ignored: Sequence[str],
        steps: Sequence[StepRun],
        relations: Relations,
    ) -> None:
        self.forward = forward
        self.relations = relations
        self.ignored = ignored
        self.steps = list(steps)
        self.tables = OperatorTables(RULES, COSTS)
        self.tables_without_costs = OperatorTables(RULES, {})
        self.known = Known()
        self.found_unprunable: list[Note] = []
        self.training_mode = _TrainingMode.NOT_OBSERVED
        self.untraced: dict[str, str] = {}
        self.frozen: list[str] = []
        self.in_training: Record | None = None
        self.verified: dict[str, Group] | None = None
        self.not_mask_exact: Sequence[Note] = ()

    def settle(self) -> tuple[Grouping, list[CostTerm]]:
        """Return the groups that work, and the operations of the full network in evaluation mode."""
        observed = _Observed(self._observe_evaluation(), None)
        grouping, observed = self._settle(observed, self._verify)
        if self.steps:
            observed = replace(observed, steps=self._observe_steps(observed.evaluation))
            grouping, observed = self._settle(observed, self._verify_steps)
        name_the_rest(self.forward, grouping, observed.joined())
        return grouping, observed.evaluation.costs

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
            else:
                self.found_unprunable.extend(finding.note(grouping) for finding in verdict.findings)

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
                tracer = run.observe(partial(Tracer, self.tables_without_costs, self.known), run.step.training)
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
        record.ties += self.relations.ties(self.forward.labelled)
        self.frozen = self.relations.kept_whole(self.forward.labelled, record)
        record.unprunable += frozen_channels(self.forward.labelled, self.frozen)
        record.unprunable += self.found_unprunable
        return form_groups(self.forward.labelled, record)

    def _ignored_channels(self, record: Record) -> list[Note]:
        notes: list[Note] = []
        for labels in record.out_slices:
            module = self.forward.labelled.module_of(labels)
            matching = [pattern for pattern in self.ignored if _matches_any(pattern, _with_parents(module))]
            notes.extend(Note(labels, module, f"is ignored by the pattern {pattern!r}") for pattern in matching)
        return notes

    def _complex_channels(self) -> list[Note]:
        notes = []
        for name, tensor in self.forward.tensors.items():
            if tensor.is_complex():
                labels_by_axis = self.forward.labelled.labels(name)
                notes += [Note(labels, module_of(name), _COMPLEX) for labels in labels_by_axis.values()]
        return notes

    # -- trying them out -------------------------------------------------------------------------------------------

    def _verify(self, grouping: Grouping, observed: _Observed) -> _Verdict:
        """Try groups in training mode, and in evaluation mode unless that has just been seen to do the same."""
        if not grouping.groups:
            return _Verdict(works=True)
        verifier = Verifier(self.forward, grouping, self.tables_without_costs, self.known)
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
            verifier = Verifier(run, grouping, self.tables_without_costs, self.known)
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
            findings.append(Finding(frozenset([number]), group.name, _BESIDE))
    return findings


def _with_parents(name: str) -> list[str]:
    """Return the names of a module and of all that it is in: "a", "a.b" and "a.b.c" for "a.b.c"."""
    steps = name.split(".")
    return [".".join(steps[: length + 1]) for length in range(len(steps))]
