"""Trace a model into a channel graph, and try the graph out on smaller tensors before anyone relies on it."""

import fnmatch
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.channel_graph import ChannelGraph, Held, Term, plan_in_force
from lightning_prune.graph.costs import COSTS, WATCHED
from lightning_prune.graph.coupling import Coupling, Slot, couple
from lightning_prune.graph.modules import named_tensors, substituted
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.tracer import FIXED, CostTerm, Labels, Record, Tracer
from lightning_prune.plan import PruningPlan

__all__ = ["trace"]

_PROBES = 20  # how often channels may be found to be stuck before all of them are kept whole


def trace(
    model: nn.Module, example_inputs: Any, *, module: str = "", ignore: Sequence[str] = ()
) -> ChannelGraph:
    """Find out which channels of a model leave together, which may not leave, and why.

    The model's forward pass runs on tensors without data, in evaluation and in training mode, and then once more with
    channels missing, to see that nothing in it relies on their number. Where data is needed (control flow that depends
    on values) the example inputs are run for real. The model is left exactly as it was: mode, parameters, buffers,
    hooks, gradients and random state.

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
        ValueError: If the inputs do not fit, a pattern matches no module, or ``module`` names no part of the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> graph.groups["0"].size
        8
        >>> graph.held
        {'3': Held(channels=10, reason='3: is an output of the network')}
    """
    forward = _Forward(model, module, example_inputs)
    record = forward.run({}, training=False)
    flops = list(record.costs)
    _extend(record, forward.run({}, training=True))
    _ignore(record, forward, ignore)
    coupling = couple(forward.slots, record)
    for _ in range(_PROBES):
        stuck = forward.probe(coupling)
        if not stuck:
            break
        record.holds.extend(stuck)
        coupling = couple(forward.slots, record)
    else:
        everything = torch.arange(1, forward.labels)
        record.holds.append((everything, "the model: relies on the number of its channels in too many places"))
        coupling = couple(forward.slots, record)
    return ChannelGraph(model, coupling.groups, coupling.held, forward.shapes, _terms(forward, coupling, flops))


class _Forward:
    """A model's forward pass, to be run on stand-ins of its tensors."""

    def __init__(self, model: nn.Module, module: str, example_inputs: Any) -> None:
        try:
            self.part = model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"The model has no module {module!r}; name one of its parts, such as 'network'.") from None
        self.args, self.kwargs = as_call(example_inputs)
        self.tensors = named_tensors(model)
        reached = {id(t) for t in (*self.part.parameters(), *self.part.buffers())}
        plan = plan_in_force(model) or PruningPlan()
        self.shapes = {name: tuple(plan.shapes.get(name, t.shape)) for name, t in self.tensors.items()}
        self.names = {id(m): name for name, m in model.named_modules()}
        self.module_names = [name for name, _ in model.named_modules() if name]
        self.slots: list[Slot] = []
        self.labels = 1  # 0 is FIXED
        for name, tensor in self.tensors.items():
            if id(tensor) in reached:
                for axis, size in enumerate(self.shapes[name]):
                    if size > 1:
                        self.slots.append(Slot(name, axis, self.labels, size))
                        self.labels += size
        self.real = False

    def slot_labels(self, slot: Slot, stays: Mapping[str, Mapping[int, Tensor]]) -> Labels:
        """Return the labels of the positions of a slot that stay."""
        labels = torch.arange(slot.start, slot.start + slot.size)
        index = stays.get(slot.tensor, {}).get(slot.axis)
        return labels if index is None else labels[index]

    def run(
        self, stays: Mapping[str, Mapping[int, Tensor]], training: bool, tracer: "Tracer | None" = None
    ) -> Record:
        """Run the forward pass with only some positions of some tensors left, and return what it showed."""
        tracer = tracer or Tracer(RULES, COSTS, self.names, WATCHED)
        if not self.real:
            try:
                return self._run(stays, training, tracer)
            except Exception as raised:
                if stays or isinstance(raised, _Stuck):
                    raise
                self.real = True  # perhaps it only needs data
                tracer = Tracer(RULES, COSTS, self.names, WATCHED)
        try:
            return self._run(stays, training, tracer)
        except Exception as raised:
            if stays or isinstance(raised, _Stuck):
                raise
            shapes = [tuple(t.shape) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
            raise ValueError(
                f"The example inputs {shapes} do not fit the forward pass of {type(self.part).__name__}: {raised}"
            ) from raised

    def _run(self, stays: Mapping[str, Mapping[int, Tensor]], training: bool, tracer: Tracer) -> Record:
        stand_ins = {id(t): self._stand_in(name, t, stays.get(name, {})) for name, t in self.tensors.items()}
        for slot in self.slots:
            tensor = stand_ins[id(self.tensors[slot.tensor])]
            tracer.set_labels(tensor, {**tracer.all_labels(tensor), slot.axis: self.slot_labels(slot, stays)})
        args, kwargs = tree_map(self._input, (self.args, self.kwargs))
        with torch.no_grad(), _random_state(), substituted(self.part, stand_ins, training), tracer:
            output = self.part(*args, **kwargs)
        for tensor in tree_leaves(output):
            for labels in tracer.all_labels(tensor).values():
                tracer.record.holds.append((labels, f"{self._maker(labels)}: is an output of the network"))
        return tracer.record

    def _maker(self, labels: Labels) -> str:
        """Name the module that the first of some labels belongs to."""
        label = int(labels.max())
        slot = next(slot for slot in self.slots if slot.start <= label < slot.start + slot.size)
        return slot.tensor.rpartition(".")[0]

    def _stand_in(self, name: str, tensor: Tensor, stays: Mapping[int, Tensor]) -> Tensor:
        shape = [len(stays[a]) if a in stays else size for a, size in enumerate(self.shapes[name])]
        if not self.real:
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif tuple(tensor.shape) != self.shapes[name]:  # a pruned model, run in its original shape
            made = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        else:
            made = tensor.detach().clone()
            for axis, index in stays.items():
                made = made.index_select(axis, index.to(made.device))
        if isinstance(tensor, nn.Parameter):
            made._is_weight = True  # type: ignore[attr-defined]
        return made

    def _input(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if self.real else torch.empty_like(leaf, device="meta")

    def probe(self, coupling: Coupling) -> list[tuple[Labels, str]]:
        """Run with every other channel missing; returns the channels that something relies on, with the reason.

        The smaller network must couple nothing that the whole one did not: where it does, positions have shifted
        against each other, because a size is written into the code.
        """
        kept = {
            name: torch.arange(group.size)[1::2] if group.size > 3 else torch.arange(group.size)[:2]
            for name, group in coupling.groups.items()
        }
        graph = ChannelGraph(self.part, coupling.groups, coupling.held, self.shapes, {})
        stays = graph.plan(kept).index()
        stuck: list[tuple[Labels, str]] = []
        for training in (False, True):
            tracer = _Prober(self.names, coupling)
            try:
                self.run(stays, training, tracer)
            except _Stuck:
                pass
            except Exception as raised:
                tracer.blame(raised)
            stuck.extend(tracer.stuck)
            if stuck:
                break
        return stuck


class _Stuck(Exception):
    """A probe has found channels that something relies on; going on would show nothing more."""


class _Prober(Tracer):
    """Watch a smaller network and notice where its channels no longer meet those they belong to."""

    def __init__(self, names: Mapping[int, str], coupling: Coupling) -> None:
        super().__init__(RULES, COSTS, names, WATCHED)
        self.component = torch.from_numpy(coupling.component)
        self.free = torch.from_numpy(coupling.group_of >= 0)
        self.stuck: list[tuple[Labels, str]] = []
        self.touched: list[Labels] = []

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        if first is None or second is None:
            return self.hold(second if first is None else first, why)
        if first.shape == second.shape and bool((self.component[first] == self.component[second]).all()):
            return None
        self._found(torch.cat([first, second]))
        raise _Stuck

    def hold(self, labels: Labels | None, why: str) -> None:
        if labels is not None and bool(self.free[labels].any()):
            self._found(labels)
            raise _Stuck

    def _found(self, labels: Labels) -> None:
        labels = labels[labels != FIXED]
        where = f"{self.where()}: relies on the number of its channels{self.line()}"
        self.stuck.append((labels[self.free[labels]], where))

    def blame(self, raised: Exception) -> None:
        """Hold what the operator that failed was given or, failing that, what was used last."""
        call = self.running
        tensors = tree_leaves((call.args, call.kwargs)) if call is not None else []
        labels = [along for tensor in tensors for along in self.all_labels(tensor).values()]
        labels = labels or self.touched[-4:]
        frame = raised.__traceback__
        module, line = "the model", ""
        while frame is not None:
            runner = frame.tb_frame.f_locals.get("self")
            if isinstance(runner, nn.Module) and id(runner) in self.names:
                module = self.names[id(runner)] or type(runner).__name__
            if _is_user_code(frame.tb_frame.f_code.co_filename):
                line = f" ({os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno})"
            frame = frame.tb_next
        found = torch.cat(labels) if labels else torch.arange(1, len(self.component))
        found = found[self.free[found]]
        if not len(found):
            found = torch.arange(1, len(self.component))
        self.stuck.append((found, f"{module}: relies on the number of its channels{line}"))

    def set_labels(self, tensor: Tensor, axes: Mapping[int, Labels | None]) -> None:  # type: ignore[override]
        Tracer.set_labels(tensor, axes)
        free = [along for along in axes.values() if along is not None and bool(self.free[along].any())]
        self.touched.extend(free)

    def line(self) -> str:
        """Name the line of the user's code that runs now."""
        frame = sys._getframe(1)
        while frame is not None:
            if _is_user_code(frame.f_code.co_filename):
                return f" ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
            frame = frame.f_back  # type: ignore[assignment]
        return ""


_FOREIGN = (os.path.dirname(torch.__file__), os.path.dirname(os.path.abspath(__file__)))


def _is_user_code(file: str) -> bool:
    return not file.startswith(_FOREIGN) and not file.startswith("<")


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments: a dictionary names them, a tuple lists them."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextmanager
def _random_state() -> Iterator[None]:
    """Give the random number generators back as they were."""
    state = random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)


def _extend(record: Record, other: Record) -> None:
    for name in ("ties", "holds", "inexact", "produced", "read"):
        getattr(record, name).extend(getattr(other, name))


def _ignore(record: Record, forward: _Forward, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        matched = {name for name in forward.module_names if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(f"The ignore pattern {pattern!r} matches no module; module names look like 'layer1.0'.")
        for labels in record.produced.copy():
            maker = forward._maker(labels)
            if any(maker == name or maker.startswith(name + ".") for name in matched):
                record.holds.append((labels, f"{maker}: is ignored by the pattern {pattern!r}"))


def _terms(forward: _Forward, coupling: Coupling, flops: list[CostTerm]) -> dict[str, list[Term]]:
    known: dict[int, Any] = {}
    slots: dict[str, list[Slot]] = {}
    for slot in forward.slots:
        slots.setdefault(slot.tensor, []).append(slot)
    ranges = {slot: torch.arange(slot.start, slot.start + slot.size) for slot in forward.slots}
    params = []
    for name, tensor in forward.tensors.items():
        if isinstance(tensor, nn.Parameter):
            axes = slots.get(name, [])
            whole = [size for a, size in enumerate(forward.shapes[name]) if a not in {slot.axis for slot in axes}]
            coefficient = torch.Size(whole).numel()
            params.append(CostTerm(coefficient, tuple(ranges[slot] for slot in axes), name.rpartition(".")[0]))
    makers = {(p.tensor, p.axis) for group in coupling.groups.values() for p in group.producers}
    channels = [
        CostTerm(1, (ranges[slot],), slot.tensor.rpartition(".")[0])
        for slot in forward.slots
        if (slot.tensor, slot.axis) in makers
    ]
    counted = {"flops": flops, "params": params, "channels": channels}
    return {metric: [coupling.term(cost, known) for cost in costs] for metric, costs in counted.items()}


__all__ += ["Held", "as_call"]
