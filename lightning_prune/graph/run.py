"""Run of a model's forward pass on stand-ins of its tensors, with labels on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.attention import FreeMultiheadAttention, free
from lightning_prune.graph.counts import number_attributes
from lightning_prune.graph.entry import Step, as_call, let_in
from lightning_prune.graph.memory import what_is_kept
from lightning_prune.graph.nearest import nearest_names
from lightning_prune.graph.nested import nested_tensors, plain, plainly, with_tensors
from lightning_prune.graph.neutral import neutral_state
from lightning_prune.graph.records import FIXED, Labels, Note
from lightning_prune.graph.sizes import class_name, has_size_attributes
from lightning_prune.graph.slots import SlotTable
from lightning_prune.graph.substitution import named_submodules, named_tensors, submodules
from lightning_prune.graph.tracer import LOOKS_AT_VALUES, Tracer, ValueWatcher
from lightning_prune.graph.twin import NotATwinError, Twin, refusing_calls, set_mode
from lightning_prune.progress import redraw
from lightning_prune.pruning_plan import Index, PruningPlan, plan_in_force

__all__ = ["ALL_KEPT", "Forward", "submodule_of"]

ALL_KEPT = PruningPlan()
_WITH_NUMBERS = (nn.MultiheadAttention, nn.Unflatten)  # of the modules that belong to torch


class Forward:
    """A model's forward pass, to be run on stand-ins of its tensors.

    Args:
        model: The model.
        module: Dotted name of the submodule to run; empty for the model itself.
        example_inputs: What it takes.

    Attributes:
        submodule: The submodule to run.
        module: Its dotted name.
        earlier: The plan in force.
        remembered: Whether others may go by what its modules returned, so that it matters what these keep.
        keeps_nothing: Whether the modules of the full network are known to be after a pass as they were before, so that
            a pass in which they are not run again shows the same.
        tensors: The parameters and buffers of the model, by name.
        shapes: Their shapes in the original model.
        module_names: The names of all submodules of the model.
        names: The names of all modules, by ``id``; that of the model's class for the model itself.
        labelled: The labels of all positions of the tensors of the submodule.
        needs_data: Whether it has to run on real data, by whether that is in training mode.
        real: Whether the pass that is made does.
        outside: Tensors that are none of the model's and follow those of it, by the names of these.

    Raises:
        ValueError: If there is no such submodule, or the model cannot be pruned at all.
    """

    def __init__(self, model: nn.Module, module: str, example_inputs: Any) -> None:
        self.submodule = submodule_of(model, module)
        self.module = module
        self.earlier = plan_in_force(model)
        modules = named_submodules(model)
        for name, submodule in modules.items():
            _refuse_untraceable(name, submodule)
        _refuse_several_devices(modules.values())
        is_step = isinstance(example_inputs, Step)
        self.example_inputs = example_inputs if is_step else plainly(example_inputs)
        self.args, self.kwargs = as_call(self.example_inputs)
        self.tensors = named_tensors(model)
        self.shapes = _original_shapes(model, self.tensors)
        self.module_names = [name for name in modules if name]
        self.names = {id(submodule): name for name, submodule in modules.items()}
        self.names[id(model)] = type(model).__name__
        self.labelled = SlotTable(self._shapes_to_label())
        self.needs_data = {False: False, True: False}
        self.real = False
        self.remembered = False
        self.keeps_nothing = False
        self.outside: Sequence[Mapping[str, Tensor]] = ()

    def _shapes_to_label(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Return the names and shapes of the tensors of the submodule."""
        reached = {id(tensor) for tensor in named_tensors(self.submodule).values()}
        kernels = self._kernels()
        for name, tensor in self.tensors.items():
            if id(tensor) in reached:
                shape = self.shapes[name]
                yield name, _without_kernel_size(shape) if id(tensor) in kernels else shape

    def _kernels(self) -> set[int]:
        """Return the ``id`` of all weights of convolutions, or what these are computed from."""
        kernels: set[int] = set()
        for module in submodules(self.submodule):
            if isinstance(module, nn.modules.conv._ConvNd):
                owners = submodules(module) if module._modules else [module]
                for owner in owners:  # a parametrization has the weight of the layer
                    kernels.update(map(id, owner._parameters.values()))
        return kernels

    def run(self, tracer: Tracer, plan: PruningPlan, training: bool) -> None:
        """Run with only some channels of the original model; the tracer's record tells what that showed.

        Args:
            tracer: The tracer.
            plan: The channels that are kept.
            training: The mode to run in.

        Raises:
            Exception: Whatever the forward pass raises.
        """
        redraw()  # bars go on from run to run
        self.real = tracer.on_data = self.needs_data[training]
        with neutral_state(self.submodule):
            twin = Twin(self.submodule, self._stand_ins(tracer, plan.index()))
            self._adapt(twin, plan)
            set_mode(twin.model, training)
            self.let_in(twin.model)
            args, kwargs = with_tensors((self.args, self.kwargs), self._stand_in_of_input)
            with self._watching(tracer, twin):
                before = self._what_is_kept(twin)
                output = self._call(tracer, twin.model, args, kwargs)
                self.keeps_nothing = before is not None and before == self._what_is_kept(twin)
        self._mark_outputs(tracer, output)

    def _what_is_kept(self, twin: Twin) -> list[tuple[str, int, int]] | None:
        return what_is_kept(twin.model) if self.remembered else None

    def _adapt(self, twin: Twin, plan: PruningPlan) -> None:
        """Bring the numbers in a twin in step with what it has, and let those of the full network be told apart."""
        adapt(twin.model, plan, self.earlier, self.module)
        for original, module in twin.pairs():
            free(module)
            if not plan.groups and _has_numbers(module):
                number_attributes(module, self.name_of(original))

    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of a submodule of the model."""
        is_model = module is self.submodule and not self.module
        return "" if is_model else self.names[id(module)]

    def let_in(self, model: nn.Module) -> None:
        """Let a twin be called with the example inputs."""
        let_in(model, self.example_inputs)

    def _call(self, tracer: Tracer, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a twin."""
        with ValueWatcher(tracer), tracer:
            return model(*args, **kwargs)

    @contextmanager
    def _watching(self, tracer: Tracer, twin: Twin) -> Iterator[None]:
        """Let a tracer know which module of a twin runs."""
        pairs = list(twin.pairs())
        for original, module in pairs:
            forward = module.forward
            if isinstance(module, FreeMultiheadAttention):
                tracer.free_modules.add(self.names[id(original)])
            rule = tracer.tables.rules.get(class_name(original))
            if rule is not None:
                forward = tracer.muting(rule, module, forward)
            vars(module)["forward"] = tracer.watched(self.names[id(original)], forward)
        try:
            yield
        finally:
            for _, module in pairs:  # which would wait for the garbage collector if they referred to themselves
                vars(module).pop("forward", None)

    def _mark_outputs(self, tracer: Tracer, output: Any) -> None:
        outputs = list(nested_tensors(output))
        for tensor in outputs:
            tracer.mark_numbered(tensor)
        for labels in tracer.labels_of(outputs):
            if int(labels.max()) > FIXED:
                module = self.labelled.module_of(labels)
                note = Note(labels, module, "is an output of the network")
                tracer.record.unprunable.append(note)

    def observe(self, make_tracer: Callable[[], Tracer], training: bool) -> Tracer:
        """Run the full network, on tensors without data if that is possible, else for real.

        Args:
            make_tracer: Makes a new tracer.
            training: The mode to run in.

        Raises:
            ValueError: If the example inputs do not fit.
        """
        needs_values = set()
        if not self.needs_data[training]:
            tracer = make_tracer()
            try:
                with refusing_calls(self.submodule):
                    self.run(tracer, ALL_KEPT, training)
            except NotATwinError:
                raise
            except Exception as raised:
                # Perhaps it only needs data; where evaluation does, training does too.
                self.needs_data.update({training: True, True: True})
                if not isinstance(raised, NotImplementedError):
                    needs_values.add(tracer.failed_in)
            else:
                return tracer
        tracer = make_tracer()
        self._run_on_data(tracer, training)
        needs_values -= tracer.sure
        needs_values |= tracer.unsure
        tracer.record.unprunable += tracer.decided
        needs_values |= {name for name in tracer.sure if self._has_more(tracer, name)}
        for name in sorted(needs_values - {""}):
            self._mark_module_unprunable(tracer, name)
        tracer.record.module_calls.clear()  # outputs take memory
        self.keeps_nothing = False
        return tracer

    def _run_on_data(self, tracer: Tracer, training: bool) -> None:
        try:
            self.run(tracer, ALL_KEPT, training)
        except Exception as raised:
            inputs = nested_tensors((self.args, self.kwargs))
            shapes = [tuple(tensor.shape) for tensor in inputs]
            network = type(self.submodule).__name__
            raise ValueError(
                f"The example inputs {shapes} do not fit the forward pass of {network}: {raised}"
            ) from raised

    def _has_more(self, tracer: Tracer, name: str) -> bool:
        """Tell whether a module has weights that no operator used, as it may for other values."""
        tensors = set(self.labelled.by_tensor)
        unused = tensors - tracer.record.used
        return any(self._is_in(tensor, name) for tensor in unused)

    def _is_in(self, tensor: str, module: str) -> bool:
        is_everything = module == self.names[id(self.submodule)]
        return is_everything or tensor.startswith(module + ".")

    def _mark_module_unprunable(self, tracer: Tracer, name: str) -> None:
        """Mark all that a module produces, consumes and is given: for other values it may do something else."""
        touched: list[Labels] = []
        for key, call in tracer.record.module_calls.items():
            if key.module == name:
                tensors = nested_tensors((call.inputs, call.output))
                touched.extend(tracer.labels_of(tensors))
        for tensor, labels_by_axis in self.labelled.by_tensor.items():
            if self._is_in(tensor, name):
                touched.extend(labels_by_axis.values())
        for labels in touched:
            tracer.record.unprunable.append(Note(labels, name, LOOKS_AT_VALUES))

    # -- stand-ins -------------------------------------------------------------------------------------------------

    def _stand_ins(self, tracer: Tracer, kept: Index) -> dict[int, Tensor]:
        """Return what stands in for each tensor, with its labels, by ``id`` of the tensor."""
        tracer.is_among = np.zeros(self.labelled.count, dtype=bool)
        stand_ins = {}
        for tensors in (self.tensors, *self.outside):
            for name, tensor in tensors.items():
                kept_here = kept.get(name, {})
                stand_in = self._stand_in(name, tensor, kept_here)
                stand_ins[id(tensor)] = stand_in
                labels = self.labelled.labels(name)
                if labels:
                    tracer.set_labels(stand_in, _keep_labels(labels, kept_here))
        return stand_ins

    def _stand_in(self, name: str, tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
        original_shape = self.shapes[name]
        shape = list(original_shape)
        for axis, positions in kept.items():
            shape[axis] = len(positions)
        if not self.real:
            stand_in = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif tuple(tensor.shape) != original_shape:  # a pruned model, run in its original shape
            stand_in = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        else:
            stand_in = tensor.detach().clone()
            for axis, positions in kept.items():
                stand_in = stand_in.index_select(axis, positions.to(stand_in.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter:
            stand_in._is_weight = True  # type: ignore[attr-defined]
        if is_parameter or tensor.is_floating_point():  # others are numbers of positions, or counts
            stand_in._is_of_network = True  # type: ignore[attr-defined]
        stand_in._numbers = ()  # type: ignore[attr-defined]
        stand_in._dotted_name = name  # type: ignore[attr-defined]
        return stand_in

    def _stand_in_of_input(self, leaf: Tensor) -> Tensor:
        leaf = plain(leaf)
        stand_in = leaf.detach().clone() if self.real else torch.empty_like(leaf, device="meta")
        stand_in._numbers = ()  # type: ignore[attr-defined]
        return stand_in


def _has_numbers(module: nn.Module) -> bool:
    """Tell whether the code of a module may compute shapes with numbers that are attributes of it."""
    if isinstance(module, _WITH_NUMBERS):
        return True
    return not has_size_attributes(module) and not type(module).__module__.startswith("torch.nn.")


def _keep_labels(labels: dict[int, Labels], kept: Mapping[int, Tensor]) -> dict[int, Labels]:
    """Return the labels of the kept positions, by axis."""
    kept_labels = dict(labels)
    for axis, positions in kept.items():
        kept_labels[axis] = labels[axis].index_select(0, positions)
    return kept_labels


def _without_kernel_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape whose axes behind the channels have a single position, since they cannot be pruned."""
    channels = shape[:2]
    kernel = shape[2:]
    return channels + (1,) * len(kernel)


def _original_shapes(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor had before the model was pruned."""
    shapes = {}
    for name, tensor in tensors.items():
        shapes[name] = tuple(tensor.shape)
    plan = plan_in_force(model)
    if plan is None:
        return shapes
    for name, shape in plan.shapes.items():
        if name in shapes:
            shapes[name] = shape
    return shapes


def submodule_of(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its dotted name; raise a ValueError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = named_submodules(model)
        raise ValueError(f"The model has no module {name!r}; {nearest_names(name, names)}.") from None


def _refuse_untraceable(name: str, module: nn.Module) -> None:
    if ".quantized." in type(module).__module__:
        raise ValueError(f"{name or type(module).__name__!r} is quantized; prune the model before quantizing it.")
    for parameter_name, parameter in module._parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"'{name}.{parameter_name}' has no shape yet; run the model once on a batch, then trace it."
            )


def _refuse_several_devices(modules: Iterable[nn.Module]) -> None:
    devices = set()
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                devices.add(str(parameter.device))
    if len(devices) > 1:
        several = ", ".join(sorted(devices))
        raise ValueError(f"The model is spread over {several}; move it to one device to trace it.")
