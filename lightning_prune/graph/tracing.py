"""Tracing a model into a channel graph that has been tried out on smaller networks."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from torch import nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import COSTS
from lightning_prune.graph.explanation import Finding
from lightning_prune.graph.groups import Grouping, form_groups
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import CostTerm, Known, Note, Record
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward, as_call
from lightning_prune.graph.slots import module_of
from lightning_prune.graph.terms import cost_terms
from lightning_prune.graph.tracer import Tracer
from lightning_prune.graph.unnamed import name_the_rest
from lightning_prune.graph.verification import Verifier
from lightning_prune.progress import progress

__all__ = ["as_call", "trace"]

_COMPLEX = "has complex numbers, which no criterion scores"


def trace(model: nn.Module, example_inputs: Any, *, module: str = "", ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find out which channels of a model can only be pruned together, which cannot be pruned, and why.

    The model's forward pass runs on tensors without data, and then once more with fewer channels, to see that nothing
    in it relies on their number, in evaluation and in training mode. Where data is needed (control flow that depends
    on values) the example inputs are run for real. The model is as it was afterwards: mode, parameters, buffers,
    hooks, gradients and random state.

    Args:
        model: Any module; a model that has been pruned before is traced in its original shape.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a dictionary of named
            ones. Costs are counted for these inputs.
        module: Dotted name of the submodule to trace, whose ``forward`` then takes the example inputs; default the
            model itself.
        ignore: Patterns (``"layer1.*"``) of names of modules whose channels are not to be pruned.

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
        patterns = _checked_patterns(ignore, forward.module_names)
        grouping, operations = _Search(forward, patterns).settle()
        terms = cost_terms(forward, grouping, operations)
    unprunable = dict(grouping.unprunable)
    return ChannelGraph(model, grouping.groups, unprunable, forward.shapes, terms, module, example_inputs)


def _checked_patterns(ignore: Sequence[str], module_names: Sequence[str]) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not _matches_any(pattern, module_names):
            raise ValueError(f"The ignore pattern {pattern!r} matches no module; module names look like 'layer1.0'.")
    return patterns


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


class _TrainingMode(Enum):
    """What is known of a network in training mode."""

    NOT_OBSERVED = auto()
    OBSERVED = auto()
    UNTRACEABLE = auto()  # it takes other inputs to be trained, such as targets


@dataclass(frozen=True)
class _Observed:
    """What the full network showed in evaluation and, where it was observed, in training mode."""

    evaluation: Record
    training: Record | None

    def joined(self) -> Record:
        """Return what both modes showed about channels, with the costs in evaluation mode."""
        joined = Record(costs=self.evaluation.costs)
        joined.extend(self.evaluation)
        if self.training is not None:
            joined.extend(self.training)
        return joined


@dataclass(frozen=True)
class _Verdict:
    """Whether groups work.

    Attributes:
        works: Whether they do.
        findings: What does not; nothing is found where training mode was not observed.
        not_mask_exact: What a smaller network showed in training mode, where that was not observed.
    """

    works: bool
    findings: Sequence[Finding] = ()
    not_mask_exact: Sequence[Note] = ()


class _Search:
    """Form groups, try them out, and mark as unprunable what does not work, until everything works.

    Args:
        forward: The forward pass.
        ignored: Patterns of names of modules whose channels are not to be pruned.

    Attributes:
        known: What has been found out about the network.
        found_unprunable: The channels that did not work.
        training_mode: What is known of training mode.
    """

    def __init__(self, forward: Forward, ignored: Sequence[str]) -> None:
        self.forward = forward
        self.ignored = ignored
        self.tables = OperatorTables(RULES, COSTS)
        self.tables_without_costs = OperatorTables(RULES, {})
        self.known = Known()
        self.found_unprunable: list[Note] = []
        self.training_mode = _TrainingMode.NOT_OBSERVED

    def settle(self) -> tuple[Grouping, list[CostTerm]]:
        """Return the groups that work, and the operations of the full network in evaluation mode."""
        observed = _Observed(self._observe_evaluation(), None)
        while True:
            grouping = self._form_groups(observed)
            verdict = self._verify(grouping, observed)
            if verdict.works:
                grouping.add_not_mask_exact(verdict.not_mask_exact)
                name_the_rest(self.forward, grouping, observed.joined())
                return grouping, observed.evaluation.costs
            if self.training_mode is _TrainingMode.NOT_OBSERVED:  # perhaps training mode only does more
                observed = replace(observed, training=self._observe_training())
            elif self._learn_which_axes_shrink(verdict.findings):  # the groups may be right
                observed = _Observed(self._observe_evaluation(), self._observe_training())
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
        return self._learn_from(training)

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
        cuts_as_often = len(trial.record.cut) == len(evaluation.cut)
        if not verifier.looks_right(trial) or not cuts_as_often:
            return _Verdict(works=False)
        # Where channels are cut is compared with what the full network does in the same mode.
        if not verifier.cuts(evaluation) and trial.covers(evaluation):
            return _Verdict(works=True, not_mask_exact=trial.record.not_mask_exact)
        in_evaluation = verifier.first_trial(training=False, full=evaluation)
        return _Verdict(verifier.works(in_evaluation), not_mask_exact=trial.record.not_mask_exact)

    def _verify_in_evaluation(self, verifier: Verifier, evaluation: Record) -> _Verdict:
        trial = verifier.first_trial(training=False, full=evaluation)
        findings = verifier.findings(trial)
        return _Verdict(works=not findings, findings=findings)


def _with_parents(name: str) -> list[str]:
    """Return the names of a module and of all that it is in: "a", "a.b" and "a.b.c" for "a.b.c"."""
    steps = name.split(".")
    return [".".join(steps[: length + 1]) for length in range(len(steps))]
