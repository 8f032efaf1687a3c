"""Trace a model into a channel graph, and try the graph out on smaller tensors before anyone relies on it."""

import fnmatch
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.channel_graph import ChannelGraph, Term, Unprunable
from lightning_prune.graph.costs import COSTS
from lightning_prune.graph.groups import Coupling, couple
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward, as_call
from lightning_prune.graph.tracer import CostTerm, Known, Note, Record, Tables, Tracer
from lightning_prune.graph.verification import UNEXPLAINED, Finding, Prober
from lightning_prune.progress import progress

__all__ = ["Unprunable", "as_call", "trace"]


def trace(model: nn.Module, example_inputs: Any, *, module: str = "", ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find out which channels of a model leave together, which may not leave, and why.

    The model's forward pass runs on tensors without data, and then once more with channels missing, to see that
    nothing in it relies on their number, in evaluation and in training mode. Where data is needed (control flow that
    depends on values) the example inputs are run for real. The model is left exactly as it was: mode, parameters,
    buffers, hooks, gradients and random state.

    Args:
        model: Any module; a model that has been pruned before is traced in its original shape.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a dictionary of named
            ones. Costs are counted for these inputs.
        module: Dotted name of the part to trace, whose ``forward`` then takes the example inputs; default the whole
            model.
        ignore: Patterns (``"layer1.*"``) of module names whose channels stay whole.

    Returns:
        The graph.

    Raises:
        ValueError: If the inputs do not fit, a pattern matches no module, ``module`` names no part of the model, or
            the model is quantized, not initialised, or spread over several devices.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> graph.groups["0"].size
        8
        >>> graph.unprunable
        {'3': Unprunable(channels=10, reason='3: is an output of the network')}
    """
    with progress(f"Tracing {type(model).__name__}"), as_written():
        forward = Forward(model, module, example_inputs)
        ignored = list(_ignored(forward, ignore))
        coupling, flops = _Search(forward, ignored).settle()
        terms = _terms(forward, coupling, flops)
    return ChannelGraph(model, coupling.groups, coupling.unprunable, forward.shapes, terms, module, example_inputs)


class _Search:
    """Form groups, try them out, and keep whole what does not work, until everything works."""

    def __init__(self, forward: Forward, ignored: list[str]) -> None:
        self.forward = forward
        self.ignored = ignored
        self.tables = Tables(RULES, COSTS)
        self.known = Known()
        self.stuck: list[Note] = []
        self.with_training = False

    def settle(self) -> tuple[Coupling, list[CostTerm]]:
        """Return the groups that work, and the operations of the whole network in evaluation mode."""
        evaluation, training = self._observe()
        while True:
            coupling = self._couple(evaluation, training)
            findings = self._probe(coupling, evaluation, training)
            if not findings:
                return coupling, evaluation.costs
            if not self.with_training:  # perhaps training mode only does more
                self.with_training = True
                evaluation, training = self._observe()
                continue
            sites = {f.site for f in findings if f.site is not None and f.site not in self.known.split}
            if sites:
                # The outer part becomes shorter, not the inner one.
                self.known = replace(self.known, split={**self.known.split, **dict.fromkeys(sites, 0)})
                evaluation, training = self._observe()
            else:
                self.stuck.extend(finding.note(coupling) for finding in findings)

    def _observe(self) -> tuple[Record, Record | None]:
        def make() -> Tracer:
            return Tracer(self.tables, self.known)

        tracers = [self.forward.observe(make, training=False)]
        if self.with_training:
            # What takes other inputs to be trained (targets, say) is traced as it is in evaluation mode.
            with suppress(ValueError):
                tracers.append(self.forward.observe(make, training=True))
        self.known = replace(self.known, grouped=frozenset().union(*(tracer.grouped for tracer in tracers)))
        return tracers[0].record, tracers[1].record if len(tracers) > 1 else None

    def _couple(self, evaluation: Record, training: Record | None) -> Coupling:
        joined = Record(costs=evaluation.costs)
        for record in (evaluation, training):
            if record is not None:
                joined.extend(record)
        for labels in joined.produced:
            maker = self.forward.maker(labels)
            for pattern in self.ignored:
                if any(fnmatch.fnmatchcase(name, pattern) for name in _with_parents(maker)):
                    joined.holds.append(Note(labels, maker, f"is ignored by the pattern {pattern!r}"))
        joined.holds.extend(self.stuck)
        return couple(self.forward.slots, joined)

    def _probe(self, coupling: Coupling, evaluation: Record, training: Record | None) -> list[Finding]:
        """Try the groups in training mode, and in evaluation mode unless that has just been seen to do the same."""
        if not coupling.groups:
            return []
        prober = Prober(self.forward, coupling, self.tables, self.known)
        if training is not None or not self.with_training:
            findings, trial = prober.probe(True, training)
            if findings:
                return findings
            # Where channels are cut is compared with what the whole network does in the same mode.
            if training is None and len(trial.record.cut) != len(evaluation.cut):
                return [UNEXPLAINED]
            if (training is not None or not prober.cuts(evaluation)) and prober.covers(trial, evaluation):
                return []
        return prober.probe(False, evaluation)[0]


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _ignored(forward: Forward, patterns: Sequence[str]) -> Iterable[str]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in forward.module_names):
            raise ValueError(f"The ignore pattern {pattern!r} matches no module; module names look like 'layer1.0'.")
        yield pattern


def _terms(forward: Forward, coupling: Coupling, flops: list[CostTerm]) -> dict[str, list[Term]]:
    known: dict[int, Any] = {}
    params = []
    of_the_part = {id(parameter) for parameter in forward.part.parameters()}
    for name, tensor in forward.tensors.items():
        if id(tensor) in of_the_part:
            axes = forward.labels(name)
            fixed = [size for axis, size in enumerate(forward.shapes[name]) if axis not in axes]
            params.append(CostTerm(torch.Size(fixed).numel(), tuple(axes.values()), name.rpartition(".")[0]))
    makers: dict[tuple[str, int], None] = {}
    for group in coupling.groups.values():
        makers.update({(part.tensor, part.axis): None for part in group.out_slices})
    channels = [CostTerm(1, (forward.labels(name)[axis],), name.rpartition(".")[0]) for name, axis in makers]
    counted = {"flops": flops, "params": params, "channels": channels}
    return {metric: [coupling.term(cost, known) for cost in costs] for metric, costs in counted.items()}
