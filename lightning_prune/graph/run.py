"""Run the forward pass of a model on stand-ins of its tensors, with labels on them."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.groups import Slot
from lightning_prune.graph.sizes import class_name
from lightning_prune.graph.substitution import named_tensors, substituted
from lightning_prune.graph.tracer import Labels, Note, Tracer, Values
from lightning_prune.progress import redraw
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

__all__ = ["Forward", "Index", "as_call"]

Index = Mapping[str, Mapping[int, Tensor]]  # the positions that stay, by tensor and axis


class Forward:
    """A model's forward pass, to be run on stand-ins of its tensors.

    Args:
        model: The model.
        module: Dotted name of the part to run.
        example_inputs: What the part takes.
    """

    def __init__(self, model: nn.Module, module: str, example_inputs: Any) -> None:
        try:
            self.part = model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"The model has no module {module!r}; name one of its parts, such as 'network'.") from None
        modules = list(model.named_modules())
        _check_traceable(modules)
        self.args, self.kwargs = as_call(example_inputs)
        self.tensors = named_tensors(model)
        plan = plan_in_force(model) or PruningPlan()
        self.shapes = {name: tuple(plan.shapes.get(name, t.shape)) for name, t in self.tensors.items()}
        self.names = {id(m): name or type(m).__name__ for name, m in modules}
        self.module_names = [name for name, _ in modules if name]
        self.slots, self.count = self._slots()
        self._whole: dict[str, dict[int, Labels]] = {}
        for slot in self.slots:
            labels = torch.arange(slot.start, slot.start + slot.size)
            self._whole.setdefault(slot.tensor, {})[slot.axis] = labels
        self.real = False

    def _slots(self) -> tuple[list[Slot], int]:
        reached = {id(t) for t in (*self.part.parameters(), *self.part.buffers())}
        slots, label = [], 1  # 0 is FIXED
        for name, tensor in self.tensors.items():
            if id(tensor) in reached:
                for axis, size in enumerate(self.shapes[name]):
                    if size > 1:
                        slots.append(Slot(name, axis, label, size))
                        label += size
        return slots, label

    def labels(self, name: str) -> dict[int, Labels]:
        """Return the labels of a tensor of the model, by axis."""
        return self._whole.get(name, {})

    def maker(self, labels: Labels) -> str:
        """Name the module that some labels belong to, or the parameter where that is the model's own."""
        at = bisect_right(self.slots, int(labels.max()), key=lambda slot: slot.start) - 1
        name = self.slots[at].tensor
        return name.rpartition(".")[0] or name

    def run(self, tracer: Tracer, stays: Index, training: bool) -> None:
        """Run with only some positions of some tensors left; the tracer's record tells what that showed.

        Raises:
            Exception: Whatever the forward pass raises.
        """

        def watched(module: nn.Module, forward: Any) -> Any:
            rule = tracer.tables.rules.get(class_name(module))
            known = forward if rule is None else tracer.as_one(rule, module, forward)
            return tracer.entering(self.names[id(module)], known)

        redraw()  # bars go on from run to run
        with ExitStack() as stack:
            stack.enter_context(_neutral_state())
            stand_ins = self._stand_ins(tracer, stays)
            args, kwargs = tree_map(self._input, (self.args, self.kwargs))
            stack.enter_context(substituted(self.part, stand_ins, training, watched))
            stack.enter_context(Values(tracer))
            stack.enter_context(tracer)
            output = self.part(*args, **kwargs)
        if self.real:  # outputs take memory
            tracer.record.visits.clear()
        for labels in tracer.labels_of(_leaves(output, set())):
            if int(labels.max()) > 0:
                tracer.record.holds.append(Note(labels, self.maker(labels), "is an output of the network"))

    def _stand_ins(self, tracer: Tracer, stays: Index) -> dict[int, Tensor]:
        stand_ins = {id(t): self._stand_in(name, t, stays.get(name, {})) for name, t in self.tensors.items()}
        for name, axes in self._whole.items():
            left = stays.get(name, {})
            tracer.set_labels(
                stand_ins[id(self.tensors[name])],
                {axis: labels[left[axis]] if axis in left else labels for axis, labels in axes.items()},
            )
        return stand_ins

    def observe(self, make_tracer: Any, training: bool) -> Tracer:
        """Run the whole network, on tensors without data if that is possible, else for real.

        Args:
            make_tracer: Makes a new tracer.
            training: The mode to run in.

        Raises:
            ValueError: If the example inputs do not fit.
        """
        tracer = make_tracer()
        guilty = ""
        if not self.real:
            try:
                self.run(tracer, {}, training)
                return tracer
            except Exception as raised:
                self.real = True  # perhaps it only needs data
                if not isinstance(raised, NotImplementedError):
                    guilty = tracer.failed_in
                tracer = make_tracer()
        try:
            self.run(tracer, {}, training)
        except Exception as raised:
            shapes = [tuple(t.shape) for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
            raise ValueError(
                f"The example inputs {shapes} do not fit the forward pass of {type(self.part).__name__}: {raised}"
            ) from raised
        for name in {guilty, *tracer.unsure} - {""}:
            self._hold_module(tracer, name)
        return tracer

    def _hold_module(self, tracer: Tracer, name: str) -> None:
        """Keep all that a module makes, reads and is given: for other values it may do something else."""
        why = "looks at values, and may do something else for others"
        for called, tensors in tracer.calls:
            if called == name:
                touched = tracer.labels_of(_leaves(tensors, set()))
                tracer.record.holds.extend(Note(along, name, why) for along in touched)
        whole = name == self.names[id(self.part)]
        for slot in self.slots:
            if whole or slot.tensor.startswith(name + "."):
                tracer.record.holds.append(Note(self._whole[slot.tensor][slot.axis], name, why))

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
        made._dotted_name = name  # type: ignore[attr-defined]
        return made

    def _input(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if self.real else torch.empty_like(leaf, device="meta")


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments: a dictionary names them, a tuple lists them."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _check_traceable(modules: list[tuple[str, nn.Module]]) -> None:
    """Refuse what cannot be pruned at all, in one sentence."""
    devices = set()
    for name, module in modules:
        if ".quantized." in type(module).__module__:
            raise ValueError(f"{name or type(module).__name__!r} is quantized; prune the model before quantizing it.")
        for own, tensor in module._parameters.items():
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                raise ValueError(f"'{name}.{own}' has no shape yet; run the model once on a batch, then trace it.")
            if tensor is not None:
                devices.add(str(tensor.device))
    if len(devices) > 1:
        raise ValueError(f"The model is spread over {', '.join(sorted(devices))}; move it to one device to trace it.")


def _leaves(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Find the tensors in nested values, also in dataclasses and other objects that PyTorch does not look into."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | type):
        seen.add(id(value))
        if isinstance(value, Mapping):
            inside = list(value.values())
        elif isinstance(value, tuple | list | set | frozenset):
            inside = list(value)
        else:
            inside = _attributes(value)
        for item in inside:
            yield from _leaves(item, seen)


def _attributes(value: Any) -> list[Any]:
    """Return what an object holds, in its dictionary and in the slots of its classes."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for own in slots for name in ([own] if isinstance(own, str) else own) if name != "__dict__"]
    found = [getattr(value, name) for name in names if hasattr(value, name)]
    return [*found, *getattr(value, "__dict__", {}).values()]


@contextmanager
def _neutral_state() -> Iterator[None]:
    """Run without gradients, fused attention layers and checks of values; give the random state back as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        torch.backends.mha.set_fastpath_enabled(False)
        # One value per channel has no variance, which does not matter where there are no values.
        check = vars(functional)["_verify_batch_size"]
        vars(functional)["_verify_batch_size"] = lambda size: None
        try:
            yield
        finally:
            vars(functional)["_verify_batch_size"] = check
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(python)
            np.random.set_state(numpy)
