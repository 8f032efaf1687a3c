"""Watch one forward pass and note, for every tensor, which channel each position along each axis belongs to.

Every position along every dimension of every parameter and buffer gets a *label*, an integer. Labels travel with the
tensors through the forward pass: an operator that only moves data moves the labels; one that mixes channels (a
convolution) ties the labels it reads to those of its weight, and gives its output the labels of the weight's other
side; one that combines tensors element by element ties their labels. Labels that are tied belong to channels that can
only leave together. What happens to the labels at each operator is said in one table, `lightning_prune.graph.rules`.
"""

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph.shapes import SHAPES

__all__ = [
    "FIXED", "Call", "CostTerm", "Known", "Labels", "Note", "Record", "Tables", "Tie", "Tracer", "Values", "Visit",
    "is_user_code",
]  # fmt: skip

Labels = Tensor  # (size of the axis,) int64: the label of each position
FIXED = 0  # the label of a position that no parameter can remove, such as a zero that `F.pad` put there

_FOREIGN = (os.path.join(os.path.dirname(torch.__file__), ""), os.path.join(os.path.dirname(__file__), ""), "<")
_NEEDS_VALUES = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select")
_MAKES_CONSTANTS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_READS_VALUES = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_TAKES_NUMBERS = ("aten.lift_fresh", "aten.scalar_tensor", "aten.full", "aten.full_like", "aten.new_full")


def is_user_code(file: str) -> bool:
    """Tell whether a file is neither part of torch nor of this package."""
    return not file.startswith(_FOREIGN)


@dataclass(frozen=True)
class Call:
    """One operator as it was called, or one module that has a rule of its own.

    Attributes:
        operator: The ATen operator, overload and all, or the module.
        args: Its positional arguments.
        kwargs: Its named arguments.
        output: What it returned.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument, whether it was given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def name(self) -> str:
        """Name of the operator without its overload, ``aten.convolution``, or of the module's class."""
        return str(getattr(self.operator, "overloadpacket", type(self.operator).__qualname__))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors among what it returned."""
        return tensors_in(self.output)

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors_in([*self.args, *self.kwargs.values()])


@dataclass(frozen=True)
class CostTerm:
    """A number of operations: a coefficient times the product of the lengths of some axes.

    Attributes:
        coefficient: What does not depend on any channel.
        axes: The labels along each axis that can become shorter.
        module: Name of the module that spends it.
    """

    coefficient: int
    axes: tuple[Labels, ...]
    module: str


@dataclass(frozen=True)
class Note:
    """Something that a rule said about channels.

    Attributes:
        labels: The channels.
        module: Name of the module that ran.
        why: What it does to them.
    """

    labels: Labels
    module: str
    why: str

    def __str__(self) -> str:
        return f"{self.module}: {self.why}"


@dataclass(frozen=True)
class Tie:
    """Positions of two axes that leave together; ``why`` is said when one side cannot leave.

    ``of_weights`` tells whether nothing but weights met there, to make another weight.
    """

    first: Labels
    second: Labels
    module: str
    why: str
    of_weights: bool = False


@dataclass(frozen=True)
class Visit:
    """One run of a module.

    Attributes:
        start: How many operators had run before it.
        stop: How many had run after it.
        output: What it returned.
    """

    start: int
    stop: int
    output: Any


@dataclass
class Record:
    """What a forward pass showed.

    Attributes:
        ties: Labels that leave together.
        holds: Channels that stay whole.
        inexact: Channels whose removal is not the same as zeroing what is read from them.
        produced: Sides of weights that make channels.
        read: Sides of weights that read channels.
        squeezed: Axes that would be gone if they had a single channel left.
        costs: Operations.
        course: The rule that each operator followed, and the numbers it was given;
            two passes of the same course do the same thing.
        passed: The labels that each of these operators gave to its first output.
        cut: The labels along each axis that an operator passed some of on, and others not.
        visits: The runs of every module, by its name and how often it had run before.
    """

    ties: list[Tie] = field(default_factory=list)
    holds: list[Note] = field(default_factory=list)
    inexact: list[Note] = field(default_factory=list)
    produced: list[Labels] = field(default_factory=list)
    read: list[Labels] = field(default_factory=list)
    squeezed: list[Labels] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)
    course: list[tuple[Any, ...]] = field(default_factory=list)
    passed: list[dict[int, Labels]] = field(default_factory=list)
    cut: list[Labels] = field(default_factory=list)
    visits: dict[tuple[str, int], Visit] = field(default_factory=dict)

    def extend(self, other: "Record") -> None:
        """Add what another pass showed about channels."""
        for name in ("ties", "holds", "inexact", "produced", "read", "squeezed"):
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True)
class Tables:
    """What the tracer looks operators up in, by name (`aten.convolution`).

    Attributes:
        rules: What the operator says about channels.
        costs: What it costs.
    """

    rules: Mapping[str, Callable[["Tracer", Call], None]]
    costs: Mapping[str, Callable[["Tracer", Call], None]]


@dataclass(frozen=True)
class Known:
    """What earlier passes have shown about a network, which a smaller one no longer shows.

    Attributes:
        split: Which part of a split axis becomes shorter, by the line of code and the number of parts.
        grouped: Names of the weights of grouped convolutions, or where they are read if they are computed; one that has
            a single group left looks like any other.
    """

    split: Mapping[tuple[str, int, int], int] = field(default_factory=dict)
    grouped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Entry:
    rule: Callable[["Tracer", Call], None]
    cost: Callable[["Tracer", Call], None] | None
    shape: Callable[..., Any] | None
    takes_numbers: bool
    needs_values: bool


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among the arguments or outputs of an operator, which nests nothing deeper than lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class Values(TorchFunctionMode):
    """Tell a tracer where a number becomes a tensor and tensors become numbers, which no operator shows.

    Args:
        tracer: The tracer.
    """

    def __init__(self, tracer: "Tracer") -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MAKES_CONSTANTS and not self.tracer.muted:
            found = _numbers(tree_leaves((args, kwargs)))
            self.tracer.constant = found if len(found) == 1 else []
        elif func in _READS_VALUES and self.tracer.all_labels(args[0]):
            self.tracer.unsure.add(self.tracer.where())
        return func(*args, **(kwargs or {}))


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float)]


class Tracer(TorchDispatchMode):
    """Carry labels through the operators of a forward pass and record what they say about channels.

    The methods `tie`, `tie_parts`, `mark_unprunable`, `mark_not_mask_exact`, `mark_out_slice`, `mark_in_slice`,
    `mark_squeezed`, `computes_with` and `cost` are the vocabulary of the rules.

    Args:
        tables: The rules and costs.
        known: What earlier passes have shown.
    """

    def __init__(self, tables: Tables, known: Known) -> None:
        super().__init__()
        self.tables = tables
        self.record = Record()
        self.modules: list[str] = []  # names of the modules that run, outermost first
        self.calls: list[tuple[str, Any]] = []  # of every module, what it was given and what it returned
        self.entered: Counter[str] = Counter()  # how often each module has been run
        self.failed_in = ""  # name of the innermost module that raised
        self.constant: list[float] = []  # the number that a tensor is being made of
        self.running: Call | None = None  # the operator that failed, after an exception
        self.of_weights = False  # the operator that runs is given weights only
        self.muted = False  # inside a module that has a rule of its own
        self.in_attention = False  # between the two matrix products of attention written as one operator
        self.unsure: set[str] = set()  # names of modules that looked at values
        self.known = known
        self.grouped = set(known.grouped)
        self.split_ties: dict[int, tuple[str, int, int]] = {}  # which ties are due to which split of an axis
        self._entries: dict[Any, _Entry] = {}
        self._custom = dict(_custom_functions(torch.autograd.Function))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch not to wrap every single operator in a guard against compilation."""
        return False

    # -- the vocabulary of the rules -------------------------------------------------------------------------------

    @staticmethod
    def labels(tensor: Any, axis: int) -> Labels | None:
        """Return the labels along one axis of a tensor, or None where its positions cannot be removed."""
        axes = getattr(tensor, "_channel_labels", None)
        return axes.get(axis % tensor.dim() if tensor.dim() else 0) if axes else None

    @staticmethod
    def all_labels(tensor: Any) -> dict[int, Labels]:
        """Return the labels of a tensor by axis; axes without labels are absent."""
        return getattr(tensor, "_channel_labels", None) or {}

    @classmethod
    def labels_of(cls, tensors: Iterable[Any]) -> list[Labels]:
        """Return the labels of all axes of some tensors."""
        return [labels for tensor in tensors for labels in cls.all_labels(tensor).values()]

    @staticmethod
    def set_labels(tensor: Tensor, axes: Mapping[int, Labels | None]) -> None:
        """Give a tensor its labels by axis; None for an axis whose positions cannot be removed."""
        tensor._channel_labels = {axis: labels for axis, labels in axes.items() if labels is not None}  # type: ignore[attr-defined]

    @staticmethod
    def is_weight(tensor: Any) -> bool:
        """Tell whether a tensor is a parameter or was computed from nothing but parameters."""
        return getattr(tensor, "_is_weight", False)

    @staticmethod
    def shift_zero(tensor: Tensor) -> None:
        """Note that a tensor, and what is computed from it, is not zero where the weights are that it is made of."""
        tensor._shifts_zero = True  # type: ignore[attr-defined]

    @staticmethod
    def shifts_zero(tensor: Any) -> bool:
        """Tell whether masking the weights that a tensor is made of does not mask the tensor."""
        return getattr(tensor, "_shifts_zero", False)

    @staticmethod
    def name_of(tensor: Any) -> str:
        """Return the dotted name of a parameter or buffer, empty for any other tensor."""
        return getattr(tensor, "_dotted_name", "")

    def tie(self, first: Labels | None, second: Labels | None, why: str) -> None:
        """Make two axes leave together, position by position.

        Args:
            first: Labels of one axis, or None when its positions cannot be removed.
            second: Labels of the other, of equal size.
            why: What to say when this keeps channels from being removed.
        """
        if first is second:
            return
        if first is None or second is None:
            self.mark_unprunable(second if first is None else first, why)
            return
        self.record.ties.append(Tie(first, second, self.where(), why, self.of_weights))

    def tie_parts(self, labels: Labels, size: int) -> None:
        """Make the channels at equal places of all parts of some size leave together."""
        first, *others = labels.split(size)
        for part in others:
            self.tie(first, part, "is split into parts")

    def mark_unprunable(self, labels: Labels | None, why: str) -> None:
        """Keep channels whole, with the reason; the name of the module that runs is put before it."""
        if labels is not None:
            self.record.holds.append(Note(labels, self.where(), why))

    def mark_not_mask_exact(self, labels: Labels | None, why: str) -> None:
        """Note that removing these channels is not the same as zeroing what is read from them."""
        if labels is not None:
            self.record.inexact.append(Note(labels, self.where(), why))

    def mark_out_slice(self, labels: Labels | None) -> None:
        """Note that these positions of a weight make channels."""
        if labels is not None:
            self.record.produced.append(labels)

    def mark_in_slice(self, labels: Labels | None) -> None:
        """Note that these positions of a weight read channels."""
        if labels is not None:
            self.record.read.append(labels)

    def computes_with(self, number: float) -> None:
        """Note a number that the operator computes with, which must stay the same when channels leave."""
        self.record.course[-1] += (number,)

    def mark_squeezed(self, labels: Labels | None) -> None:
        """Note that this axis would be gone if it had a single channel left."""
        if labels is not None:
            self.record.squeezed.append(labels)

    def cost(self, coefficient: int, *axes: Labels | int) -> None:
        """Add operations: the coefficient times the length of every axis, given by its labels or as a number."""
        for axis in axes:
            if isinstance(axis, int):
                coefficient *= axis
        self.record.costs.append(
            CostTerm(coefficient, tuple(axis for axis in axes if not isinstance(axis, int)), self.where())
        )

    def axes(self, tensor: Tensor) -> list[Labels | int]:
        """Return, for each axis of a tensor, its labels or its size where it has none."""
        found = self.all_labels(tensor)
        return [found.get(axis, size) for axis, size in enumerate(tensor.shape)]

    def split_axis(self, sizes: tuple[int, ...]) -> int:
        """Say which of the parts that an axis is split into gets shorter when channels leave.

        Code that splits channels writes one size down and computes the other; which is which shows only when the
        channels become fewer. The last one is taken to be computed, until a probe has shown otherwise.

        Args:
            sizes: The parts, outermost first.
        """
        site = (*self._line(), len(sizes))
        self.split_ties[len(self.record.ties)] = site
        return self.known.split.get(site, len(sizes) - 1)

    def where(self) -> str:
        """Name the module that runs now."""
        return self.modules[-1] if self.modules else "the model"

    def inside(self, code: Any) -> bool:
        """Tell whether a Python function, given by its code object, is on the call stack."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _RUN:
            if frame.f_code is code:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def line(self) -> str:
        """Name the line of code outside torch that runs now, as `` (file.py:12)``."""
        file, line = self._line()
        return f" ({os.path.basename(file)}:{line})" if file else ""

    def _line(self) -> tuple[str, int]:
        frame = sys._getframe(1)
        while frame is not None:
            if is_user_code(frame.f_code.co_filename):
                return frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back  # type: ignore[assignment]
        return "", 0

    # -- the forward pass ------------------------------------------------------------------------------------------

    def entering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward function of a module, so that the tracer knows which module runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.modules.append(name)
            visit = name, self.entered[name]
            self.entered[name] += 1
            start = len(self.record.course)
            try:
                output = forward(*args, **kwargs)
            except Exception as raised:
                self.failed_in = self.failed_in or name
                output = self.instead(visit, start, (args, kwargs), raised)
            finally:
                self.modules.pop()
            self.calls.append((name, (args, kwargs, output)))
            self.record.visits[visit] = Visit(start, len(self.record.course), output)
            return output

        return run

    def as_one(
        self, rule: Callable[["Tracer", Call], None], module: Any, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Wrap the forward function of a module that has a rule of its own: what runs inside it says nothing."""

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.muted = self.muted, True
            try:
                output = forward(*args, **kwargs)
            finally:
                self.muted = outer
            if not outer:
                call = Call(module, args, kwargs, output)
                self.record.course.append((rule,))
                self.of_weights = False
                self._apply(rule, call, [*call.given, *module.parameters()])
            return output

        return run

    def instead(self, visit: tuple[str, int], start: int, inputs: Any, raised: Exception) -> Any:
        """Return what stands in for the output of a module that failed; here nothing does.

        Args:
            visit: The name of the module, and how often it had run before.
            start: How many operators had run before it.
            inputs: What it was given.
            raised: What it raised.
        """
        raise raised

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        entry = self._entries.get(func) or self._entry(func)
        self.running = Call(func, args, kwargs, None)
        output = NotImplemented if entry.shape is None else entry.shape(*args, **kwargs)
        tensors = tensors_in(args) if not kwargs else tensors_in([*args, *kwargs.values()])
        if output is NotImplemented:
            output = _run(func, args, kwargs, tensors)
        self.of_weights = bool(tensors) and all(map(self.is_weight, tensors))
        if self.of_weights:
            for made in tensors_in(output):
                made._is_weight = True  # type: ignore[attr-defined]
        if self.muted:
            return output
        if entry.needs_values:
            self.unsure.add(self.where())
        if entry.takes_numbers or any(map(self.all_labels, tensors)):
            self._follow(entry, Call(func, args, kwargs, output), tensors)
        if entry.cost is not None:  # also where no channel can be removed
            entry.cost(self, Call(func, args, kwargs, output))
        self.running = None
        return output

    def _follow(self, entry: _Entry, call: Call, tensors: list[Tensor]) -> None:
        custom = self._custom_function()
        if custom:
            for labels in self.labels_of(tensors):
                self.mark_unprunable(labels, f"runs the autograd function {custom}, whose backward pass cannot be seen")
        if entry.takes_numbers:
            numbers = _numbers([*call.args, *call.kwargs.values(), *self.constant])
            self.record.course.append((entry.rule, call.operator, *numbers))
            self.constant = []
        else:
            self.record.course.append((entry.rule,))
        self._apply(entry.rule, call, tensors)

    def _apply(self, rule: Callable[["Tracer", Call], None], call: Call, tensors: list[Tensor]) -> None:
        given = self.labels_of(tensors)  # now, because a rule may give other labels to what is changed in place
        try:
            rule(self, call)
        except Exception as raised:  # a rule that was not made for this: as good as none
            for labels in self.labels_of(tensors):
                self.mark_unprunable(labels, f"runs {call.name} in a way that its rule does not know ({raised!r})")
        outputs = call.outputs
        if any(map(self.shifts_zero, tensors)):
            for output in outputs:
                self.shift_zero(output)
        self.record.passed.append(self.all_labels(outputs[0]) if outputs else {})
        for made in self.labels_of(outputs):
            if given and not any(made is each for each in given):  # most often one is
                self.record.cut.extend(_cut(made, given))

    def _custom_function(self) -> str:
        """Name the autograd function of the user that runs now, if one does."""
        frame = sys._getframe(1) if self._custom else None
        while frame is not None and frame.f_code is not _RUN:
            if frame.f_code in self._custom:
                return self._custom[frame.f_code]
            frame = frame.f_back
        return ""

    def _entry(self, func: Any) -> _Entry:
        name = str(func.overloadpacket)
        rules = self.tables.rules
        pointwise = torch.Tag.pointwise in func.tags
        if name.endswith("_") and name not in rules:  # in place: as the operator that it is short for
            pointwise = pointwise or _is_pointwise(name[:-1]) or rules.get(name[:-1]) is rules["pointwise"]
        rule = rules.get(name) or rules["pointwise" if pointwise else "unknown"]
        takes_numbers = pointwise or name in _TAKES_NUMBERS
        entry = _Entry(rule, self.tables.costs.get(name), SHAPES.get(name), takes_numbers, name in _NEEDS_VALUES)
        self._entries[func] = entry
        return entry


def _cut(made: Labels, given: list[Labels]) -> list[Labels]:
    """Return the labels along those of some axes that one made of them has only some of."""
    found = np.isin(np.concatenate(given), made.numpy(), kind="table")
    parts = np.split(found, np.cumsum([len(each) for each in given[:-1]]))
    return [each for each, part in zip(given, parts, strict=True) if part.any() and not part.all()]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Call an operator; constants that were made on some device meet tensors without data as ones without data too."""
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        writes_data = func._schema.is_mutable and not tensors[0].is_meta
        if writes_data or len({tensor.is_meta for tensor in tensors}) < 2:
            raise
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _custom_functions(kind: Any) -> Iterator[tuple[Any, str]]:
    """Find the code of the forward function, and the name, of every autograd function that is not part of torch."""
    for function in kind.__subclasses__():
        code = getattr(inspect.unwrap(function.forward), "__code__", None)
        if code is not None and is_user_code(code.co_filename):
            yield code, function.__name__
        yield from _custom_functions(function)


def _is_pointwise(name: str) -> bool:
    space, _, operator = name.partition(".")
    packet = getattr(getattr(torch.ops, space), operator, None)
    return packet is not None and torch.Tag.pointwise in getattr(packet, packet.overloads()[0]).tags


_RUN = Tracer.entering(None, "", lambda: None).__code__  # type: ignore[arg-type]
