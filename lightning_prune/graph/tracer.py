"""Tracer: watches one forward pass and follows the channels that each position of every tensor belongs to.

Every position along every dimension of every parameter and buffer gets a *label*, an integer. Labels travel with the
tensors through the forward pass: an operator that only moves data moves the labels; one that mixes channels (a
convolution) ties the labels of its input to those of its weight, and gives its output the labels of the weight's other
side; one that combines tensors element by element ties their labels. Labels that are tied belong to channels that can
only be pruned together. What happens to the labels at each operator is said in one table,
`lightning_prune.graph.rules`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _DisableTorchDispatch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.counts import CountPower, counted_shape
from lightning_prune.graph.frames import autograd_functions, first_on_stack
from lightning_prune.graph.looks import Looks
from lightning_prune.graph.memory import Memory, copied
from lightning_prune.graph.operators import Operator, OperatorTables, TracerRule
from lightning_prune.graph.records import (
    FIXED,
    Call,
    CallKey,
    Known,
    Labels,
    LeastRequired,
    ModuleCall,
    Note,
    Shaping,
    numbers_in,
    tensors_in,
)
from lightning_prune.graph.recurrent import RECURRENT, run_one_step
from lightning_prune.graph.resized import MULTIPLYING, SCALED, SHAPING, SPLITTING, sizes_given
from lightning_prune.graph.sameness import Sameness, same_along, set_same_along
from lightning_prune.graph.vocabulary import Vocabulary
from lightning_prune.graph.whole import WHOLE
from lightning_prune.graph.writing import note_write

__all__ = ["FIXED", "Call", "Labels", "Tracer", "ValueWatcher", "tensors_in"]  # and what else a rule is written with

_MAKES_CONSTANTS = frozenset({torch.tensor, torch.as_tensor, Tensor.new_tensor})
_GIVES_SHAPES_OF_OTHERS = frozenset({Tensor.view_as, Tensor.reshape_as})
_GIVES_SHAPES = frozenset({Tensor.view, Tensor.reshape, torch.reshape, *_GIVES_SHAPES_OF_OTHERS})
_TAKES_SIZES = SHAPING | SPLITTING | {SCALED}
_FEW_NUMBERS = 64  # in a tensor that is taken to be made of numbers in code
_READS_VALUES = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})
_SAID_WHEN_USED = frozenset({"_numbered", "_when_used"})  # of tensors, see `Vocabulary.mark_numbered`
LOOKS_AT_VALUES = "looks at values, and may do something else for others"
_SPLITS_BY_COUNT = frozenset({Tensor.chunk, torch.chunk, Tensor.tensor_split, torch.tensor_split})


class Tracer(Vocabulary, TorchDispatchMode):
    """Carry labels through the operators of a forward pass and record what they say about channels.

    Its vocabulary, such as `tie`, `mark_unprunable` and `cost`, is what rules are written in.

    Args:
        tables: What operators say about channels, and what they cost.
        known: What earlier passes have shown.

    Attributes:
        calls_of: How often each module has been called.
        failed_in: Name of the innermost module that raised.
        unsure: Names of the modules that may do something else for other values of the network.
        sure: Names of those that looked at values which depend on the inputs alone, or decide about a few tensors.
        decided: The channels of these.
        constant: The numbers that a tensor is being made of.
        on_data: Whether the pass runs on real data, as code looks at values.
        meets_channels: Whether it matters which numbers the operator that runs computes with.
        numbers_met: The numbers behind what meets channels in it.
        running_inputs: What the operator that runs was given; after an exception, what the one that failed was given.
        muted: Whether what runs says nothing, as what is inside a module that has a rule of its own.
        memory: What modules returned in another pass, which need not run again for the like; None to run all.
        takes_numbers: Whether it matters which numbers operators compute with.
        noted: The names of all that is noted on the tensors that the operator which runs was given.
        looks: What code can decide about that has looked at values of the network.
        is_among: (labels,) bool, nowhere true between two operators: room to tell which labels are among others.
    """

    def __init__(self, tables: OperatorTables, known: Known) -> None:
        super().__init__(known)
        self.tables = tables
        self.calls_of: dict[str, int] = {}
        self.failed_in = ""
        self.unsure: set[str] = set()
        self.sure: set[str] = set()
        self.constant: list[float] = []
        self.meets_channels = False
        self.numbers_met: tuple[Any, ...] = ()
        self.on_data = False
        self.running_inputs: list[Tensor] = []
        self.muted = False
        self.memory: Memory | None = None
        self.takes_numbers = True
        self.noted: set[str] = set()
        self.is_among = np.zeros(0, dtype=bool)
        self.looks = Looks(self.module_frame, self._note_reach)
        self.decided: list[Note] = []
        self._autograd_functions = autograd_functions()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch not to wrap every single operator in a guard against compilation."""
        return False

    # -- modules ---------------------------------------------------------------------------------------------------

    def watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward function of a module, so that the tracer knows which module runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run_module(name, forward, args, kwargs)

        return run

    def _run_module(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = args, kwargs
        if self.memory is not None:
            call = self.memory.recall(name, inputs)
            if call is not None:
                with self.aside():
                    return self.again(call.output)
        if self.looks.pending:
            self._note_reach(None)
        number = self.calls_of.get(name, 0)
        self.calls_of[name] = number + 1
        key = CallKey(name, number)
        start = len(self.record.operator_trace)
        self.modules.append(name)
        try:
            output = forward(*args, **kwargs)
        except Exception as raised:
            self.failed_in = self.failed_in or name
            with self.aside():
                output = self.instead_of(key, start, inputs, raised)
        finally:
            self.modules.pop()
        stop = len(self.record.operator_trace)
        self.record.module_calls[key] = ModuleCall(start, stop, inputs, output)
        return output

    module_frame = _run_module.__code__

    def again(self, output: Any) -> Any:
        """Return what a module returned in another pass.

        Args:
            output: What it returned in the full network.
        """
        return copied(output)

    def instead_of(self, key: CallKey, start: int, inputs: Any, raised: Exception) -> Any:
        """Return what stands in for the output of a module that failed; here nothing does.

        Args:
            key: The call of the module.
            start: Length of the operator trace before it.
            inputs: What it was given.
            raised: What it raised.
        """
        raise raised

    def muting(self, rule: TracerRule, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward function of a module that has a rule of its own: what runs inside it says nothing."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.muted:
                return forward(*args, **kwargs)
            call = self._run_muted(module, forward, args, kwargs)
            inputs = [*call.given, *module.parameters()]
            self._note_whole(rule, call, inputs)
            return call.output

        return run

    def run_recurrent(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a recurrent function as if it were one operator, not a dozen of them for each step."""
        operator = self.tables.look_up(RECURRENT[function])
        call = self._run_muted(operator.function, partial(run_one_step, function), args, {})
        self._note_whole(operator.rule, call, call.given)
        if operator.cost is not None:
            operator.cost(self, call)
        return call.output

    def _run_muted(self, operator: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Call:
        with self.aside():
            output = run(*args, **kwargs)
        return Call(operator, args, kwargs, output)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run operators that say nothing."""
        before = self.muted
        self.muted = True
        try:
            yield
        finally:
            self.muted = before

    def _note_whole(self, rule: TracerRule, call: Call, inputs: list[Tensor]) -> None:
        """Follow the rule of what ran as one."""
        self.of_weights = False
        self.noted = set().union(*map(vars, inputs))
        self.record.operator_trace.append((rule,))
        with self.aside():
            self._apply(rule, call, self.labels_of(inputs), inputs)

    # -- operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = self.tables.look_up(func)
        inputs = tensors_in([*args, *kwargs.values()])
        self.running_inputs = inputs
        output = operator.run(args, kwargs, inputs)
        self._note_operator(operator, Call(func, args, kwargs, output), inputs)
        return output

    def run_whole(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function as one operator that PyTorch would run as several, or return NotImplemented.

        Args:
            function: One of `WHOLE`.
            args: Its positional arguments.
            kwargs: Its named arguments.
        """
        called = None if self.muted else WHOLE[function](*args, **kwargs)
        if called is None:
            return NotImplemented
        operator = self.tables.look_up(called[0])
        if operator.shape is None:
            return NotImplemented
        with _DisableTorchDispatch():  # what follows is about labels and shapes
            output = operator.shape(*called[1], **called[2])
            if output is NotImplemented:
                return output
            call = Call(*called, output)
            self._note_operator(operator, call, call.given)
        return output[0] if isinstance(output, tuple) else output

    def _note_operator(self, operator: Operator, call: Call, inputs: list[Tensor]) -> None:
        """Note an operator that has run."""
        self._note_origin(call, inputs)
        numbers = self._numbers_behind(operator, call, inputs)
        self.meets_channels = self._has_say(operator, inputs)
        self._pass_on(numbers, call)
        if not self.muted:
            self._follow(operator, call, inputs)
            self.running_inputs = []

    def _note_origin(self, call: Call, inputs: list[Tensor]) -> None:
        """Note what the outputs of an operator are computed from."""
        self.noted = set().union(*map(vars, inputs))
        if "_dotted_name" in self.noted:
            self.record.used.update(map(self.name_of, inputs))
        self.of_weights = "_is_weight" in self.noted and all(map(self.is_weight, inputs))
        if self.of_weights:
            for made in call.outputs:
                made._is_weight = True  # type: ignore[attr-defined]
        if "_is_of_network" in self.noted and any(map(self.is_of_network, inputs)):
            for made in call.outputs:
                made._is_of_network = True  # type: ignore[attr-defined]

    def _numbers_behind(self, operator: Operator, call: Call, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Return the numbers that what an operator makes beside the network is made of: a width may be among them."""
        found: list[Any] = []
        if not self.on_data:
            for tensor in inputs:
                found += _numbers_of(tensor)
        if operator.reduces and self._is_beside_network(inputs[0]):
            found.append(inputs[0].shape)
        if operator.takes_numbers:
            found += numbers_in([*call.args, *call.kwargs.values()])
            found += self.constant
            self.constant = []
        if not found:
            return ()
        distinct = dict.fromkeys(found)
        return tuple(distinct)[:_FEW_NUMBERS]

    def _has_say(self, operator: Operator, inputs: list[Tensor]) -> bool:
        """Tell whether it matters here which numbers an operator computes with.

        Where code looks at values, what has no channels may run more often or less, as for boxes of each class.
        """
        has_labels = "_channel_labels" in self.noted and any(map(self.all_labels, inputs))
        return has_labels or (operator.takes_numbers and not self.on_data)

    def _pass_on(self, numbers: tuple[Any, ...], call: Call) -> None:
        """Keep numbers for the step that is noted, or let what was made with them remember them."""
        self.numbers_met = numbers if self.meets_channels else ()
        behind = () if self.meets_channels else numbers
        for made in call.outputs:
            made._numbers = behind  # type: ignore[attr-defined]
            if behind and made._base is not None:  # which is written to, too
                made._base._numbers = behind  # type: ignore[attr-defined]

    def _is_beside_network(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has no channels, and values that depend on its shape and the inputs alone."""
        if self.on_data or self.all_labels(tensor):
            return False
        return not self.is_of_network(tensor) or len(same_along(tensor)) == tensor.dim()

    def _follow(self, operator: Operator, call: Call, inputs: list[Tensor]) -> None:
        """Record what an operator says about channels and what it costs."""
        if operator.needs_values:
            self.note_look(inputs)
        if not self.noted.isdisjoint(_SAID_WHEN_USED):
            for tensor in inputs:
                self.mark_numbered(tensor)
        if self.meets_channels:
            self._refuse_autograd_functions(inputs)
            self._note_step(operator)
            self._apply(operator.rule, call, self.labels_of(inputs), inputs)
        elif operator.takes_numbers:  # and says along which axes what it makes is the same
            operator.rule(self, call)
        if operator.cost is not None:  # also where no channel can be pruned
            operator.cost(self, call)
        if operator.sameness is not None:
            self._note_sameness(operator.sameness, call)
        if operator.written is not None:
            note_write(self, operator, call)

    @staticmethod
    def _note_sameness(sameness: Sameness, call: Call) -> None:
        outputs = call.outputs
        if not outputs:  # of an axis of no length
            return
        axes = sameness(call)
        for output in outputs:
            set_same_along(output, axes)

    def note_shaping(
        self,
        function: str,
        tensor: Tensor,
        sizes: Sequence[int],
        labels: Sequence[Labels | None],
        power: float = 1.0,
    ) -> None:
        """Note sizes that code gives a function.

        Args:
            function: What the function does; see `lightning_prune.pruning_plan.Site`.
            tensor: The tensor that it is given.
            sizes: The sizes as the code has them.
            labels: The labels along the axis that each is of.
            power: Which power of its size a factor is.
        """
        given = self.all_labels(tensor)
        seen = Shaping(self.where(), function, tuple(tensor.shape), given, tuple(sizes), tuple(labels), power)
        self.record.shapings.append(seen)

    def note_scale(self, query: Tensor, *others: Any, scale: float | None = None, **named: Any) -> None:
        """Note attention that is scaled by the width of the queries, unless it is given a scale."""
        if scale is None and len(others) < 6:
            self.note_shaping("scale", query, (), ())

    def note_factor(self, tensor: Tensor, factor: CountPower) -> None:
        """Note a power of a number of channels that a tensor is multiplied or divided by."""
        count = factor.count
        if count.record is not self.record:
            return
        self.note_shaping("factor", tensor, [count], [None], factor.power)
        if factor.power < 0:  # of nothing there is no such power
            self.record.least_required.append(LeastRequired(count.labels, math.ceil(len(count.labels) / count)))

    def note_look(self, tensors: Iterable[Tensor]) -> None:
        """Note that the module which runs looks at the values of tensors."""
        if not any(map(self.is_of_network, tensors)):
            self.sure.add(self.where())
        elif self.on_data:
            self.looks.add()
        else:
            self._note_reach(None)

    def _note_reach(self, tensors: list[Tensor] | None) -> None:
        """Note what may be done otherwise for other values of the network: to some tensors, or all in the module."""
        module = self.where()
        if tensors is None:
            self.unsure.add(module)
            return
        self.sure.add(module)
        for labels in self.labels_of(tensors):
            self.decided.append(Note(labels, module, LOOKS_AT_VALUES))

    def _refuse_autograd_functions(self, inputs: list[Tensor]) -> None:
        """Mark what an autograd function of somebody's own is given, if one runs."""
        if not self._autograd_functions:
            return
        function = first_on_stack(self._autograd_functions, self.module_frame)
        if function:
            why = f"runs the autograd function {function}, whose backward pass cannot be seen"
            self._mark_all_unprunable(inputs, why)

    def _note_step(self, operator: Operator) -> None:
        """Add an operator, and the numbers that meet channels in it, to the operator trace."""
        step: tuple[Any, ...] = (operator.rule,)
        if operator.takes_numbers or self.numbers_met:
            step += (operator.function,)
        if self.takes_numbers:
            step += self.numbers_met
        self.record.operator_trace.append(step)

    def computes_with(self, number: float) -> None:
        """Note a number as any rule says it, where it matters."""
        if self.takes_numbers:
            super().computes_with(number)

    def _apply(self, rule: TracerRule, call: Call, given: list[Labels], inputs: list[Tensor]) -> None:
        """Follow a rule, and note what became of the labels of the inputs.

        Args:
            rule: The rule.
            call: The call of the operator.
            given: The labels of the inputs before: a rule may give others to what is changed in place.
            inputs: The tensors that the operator was given.
        """
        self.splits = False
        if "_is_of_scores" in self.noted and any(map(self.is_of_scores, inputs)):
            for output in call.outputs:
                self.set_of_scores(output)
        try:
            rule(self, call)
        except Exception as raised:  # a rule that was not made for this: as good as none
            why = f"runs {call.name} in a way that its rule does not know ({raised!r})"
            self._mark_all_unprunable(inputs, why)
        outputs = call.outputs
        if rule in self.tables.moving and all(map(self._is_zero_kept, inputs)):
            for output in outputs:
                self.keep_zero(output)
        if "_shifts_zero" in self.noted and any(map(self.shifts_zero, inputs)):
            for output in outputs:
                self.shift_zero(output)
        self.record.output_labels.append(self.all_labels(outputs[0]) if outputs else {})
        if self.on_data:
            self.record.given_labels.append(given)
        if not self.splits:  # which ties each position to one that is passed on
            self._note_cuts(outputs, given)

    def _is_zero_kept(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has no channels, or is zero along those all of whose weights are."""
        return self.keeps_zero(tensor) or not self.all_labels(tensor)

    def _note_cuts(self, outputs: list[Tensor], given: list[Labels]) -> None:
        """Note the labels of which outputs have only some."""
        for made in self.labels_of(outputs):
            passed_on = any(made is labels for labels in given)  # the most frequent case
            if given and not passed_on:
                self.record.cut.extend(self._cut_axes(made, given))

    def _cut_axes(self, made: Labels, given: list[Labels]) -> list[Labels]:
        """Return those of the given labels of which an output has only some."""
        in_output = made.numpy()
        self.is_among[in_output] = True
        cut = []
        for labels in given:
            found = self.is_among[labels.numpy()]
            if found.any() and not found.all():
                cut.append(labels)
        self.is_among[in_output] = False
        return cut

    def _mark_all_unprunable(self, tensors: list[Tensor], why: str) -> None:
        for labels in self.labels_of(tensors):
            self.mark_unprunable(labels, why)


def _numbers_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the numbers behind a tensor; its own if no operator has made it, as in ``torch.Tensor([2])``."""
    numbers = getattr(tensor, "_numbers", None)
    if numbers is not None:
        return numbers
    if tensor.is_meta or tensor.numel() > _FEW_NUMBERS:
        return ()
    with torch._C.DisableTorchFunction():  # nothing of the network looks at these
        return (str(tensor.tolist()),)


class ValueWatcher(TorchFunctionMode):
    """Tell a tracer where a number becomes a tensor and tensors become numbers, which no operator shows.

    Args:
        tracer: The tracer.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if func in _MAKES_CONSTANTS and not tracer.muted:
            numbers = numbers_in(tree_leaves((args, kwargs)))
            tracer.constant = numbers if len(numbers) <= _FEW_NUMBERS else []
        elif func in _READS_VALUES:
            tracer.note_look(args[:1])
        elif func in RECURRENT and not kwargs and not tracer.muted:
            return tracer.run_recurrent(func, args)
        elif func in _GIVES_SHAPES:
            tracer.sizes_written = self._sizes_written(func, *args, **kwargs)
        elif func in _SPLITS_BY_COUNT:
            tracer.parts_wanted = _number_of_parts(*args, **kwargs)
        try:
            output = tracer.run_whole(func, args, kwargs) if func in WHOLE else NotImplemented
            if output is NotImplemented:
                output = func(*args, **kwargs)
        finally:
            tracer.sizes_written = ()
            tracer.parts_wanted = 0
        if func in _TAKES_SIZES and not tracer.muted:
            self._note_shaping(func, args, kwargs, output)
        elif func in MULTIPLYING and isinstance(args[-1], CountPower) and not tracer.muted:
            tracer.note_factor(*args)
        is_size = isinstance(output, torch.Size) or func is Tensor.size
        return self._counted(output, *args, **kwargs) if is_size else output

    def _note_shaping(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Note the sizes that code gives, if they are of channels."""
        tracer = self.tracer
        if func is SCALED:
            tracer.note_scale(*args, **kwargs)
            return
        tensor, sizes, others = sizes_given(func, args, kwargs)
        if func in SHAPING:
            labels = [tracer.labels(output, axis) for axis in range(len(sizes))]
            tracer.note_shaping("shape", tensor, sizes, labels)
        elif tracer.where() not in tracer.free_modules:
            axis = others.get("dim", 0)
            labels = [tracer.labels(piece, axis) for piece in output]
            tracer.note_shaping("split", tensor, [sizes] * len(output) if isinstance(sizes, int) else sizes, labels)

    def _counted(self, size: Any, tensor: Any = None, dim: int | None = None) -> Any:
        """Return the size of a tensor, all of it or that of one axis, as counts of channels."""
        labels_by_axis = self.tracer.all_labels(tensor)
        if not labels_by_axis:
            return size
        shape = counted_shape(tensor.shape, labels_by_axis, self.tracer.record)
        return shape if dim is None else shape[dim]

    def _sizes_written(self, func: Any, tensor: Tensor, *sizes: Any, **named: Any) -> Sequence[int]:
        """Return the shape that a function is to give a tensor, as the code has it."""
        given = tree_leaves((sizes, named))
        if func in _GIVES_SHAPES_OF_OTHERS:
            [other] = given
            return self._counted(other.shape, other)
        return [size for size in given if isinstance(size, int)]


def _number_of_parts(tensor: Tensor, *settings: Any, **named: Any) -> int:
    """Return how many parts a function is to split an axis into; 0 where it is given their sizes."""
    named.pop("dim", None)
    given = [*settings, *named.values()]
    wanted = given[0]
    if isinstance(wanted, int):
        return wanted
    return 0
