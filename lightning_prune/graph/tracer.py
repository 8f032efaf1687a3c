"""Watch one forward pass and note, for every tensor, which channel each position along each axis belongs to.

Every position along every dimension of every parameter and buffer gets a *label*, an integer. Labels travel with the
tensors through the forward pass: an operator that only moves data moves the labels; one that mixes channels (a
convolution) ties the labels it reads to those of its weight, and gives its output the labels of the weight's other
side; one that combines tensors element by element ties their labels. Labels that are tied belong to channels that can
only leave together. What happens to the labels at each operator is said in one table, `lightning_prune.graph.rules`.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FIXED", "Call", "CostTerm", "Labels", "Tracer"]

Labels = Tensor  # (size of the axis,) int64: the label of each position
FIXED = 0  # the label of a position that no parameter can remove, such as a zero that `F.pad` put there

_TORCH_FOLDER = os.path.dirname(torch.__file__)


@dataclass(frozen=True)
class Call:
    """One operator as it was called.

    Attributes:
        operator: The ATen operator, overload and all.
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


@dataclass
class Record:
    """What a forward pass showed."""

    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    holds: list[tuple[Labels, str]] = field(default_factory=list)
    inexact: list[tuple[Labels, str]] = field(default_factory=list)
    produced: list[Labels] = field(default_factory=list)
    read: list[Labels] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)


class _FunctionScope(TorchFunctionMode):
    """Remember which of a few torch functions is running, for operators that look the same once decomposed."""

    def __init__(self, watched: Iterable[Callable[..., Any]]) -> None:
        super().__init__()
        self.watched = frozenset(watched)
        self.running: list[Callable[..., Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.watched:
            return func(*args, **(kwargs or {}))
        self.running.append(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running.pop()


class Tracer(TorchDispatchMode):
    """Carry labels through the operators of a forward pass and record what they say about channels.

    The methods `tie`, `hold`, `inexact`, `produce`, `read` and `cost` are the vocabulary of the rules.

    Args:
        rules: The rule of each operator, by name (`aten.convolution`).
        costs: What each operator costs, by name.
        names: Name of each module, by `id`.
        scoped: Torch functions that rules and costs ask for by `inside`.
    """

    def __init__(
        self,
        rules: Mapping[str, Callable[["Tracer", Call], None]],
        costs: Mapping[str, Callable[["Tracer", Call], None]],
        names: Mapping[int, str],
        scoped: Iterable[Callable[..., Any]] = (),
    ) -> None:
        super().__init__()
        self.rules = rules
        self.costs = costs
        self.names = names
        self.record = Record()
        self.scope = _FunctionScope(scoped)
        self.running: Call | None = None  # the operator that failed, after an exception

    # -- the vocabulary of the rules -------------------------------------------------------------------------------

    @staticmethod
    def labels(tensor: Any, axis: int) -> Labels | None:
        """Return the labels along one axis of a tensor, or None where its positions cannot be removed."""
        axes = getattr(tensor, "_channel_labels", None)
        return None if axes is None else axes.get(axis % tensor.dim() if tensor.dim() else 0)

    @staticmethod
    def all_labels(tensor: Any) -> dict[int, Labels]:
        """Return the labels of a tensor by axis; axes without labels are absent."""
        return getattr(tensor, "_channel_labels", None) or {}

    @staticmethod
    def set_labels(tensor: Tensor, axes: Mapping[int, Labels | None]) -> None:
        """Give a tensor its labels by axis; None for an axis whose positions cannot be removed."""
        tensor._channel_labels = {axis: labels for axis, labels in axes.items() if labels is not None}  # type: ignore[attr-defined]

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
            self.hold(second if first is None else first, why)
            return
        self.record.ties.append((first, second))
        if not bool(first.all()) or not bool(second.all()):  # some position is FIXED
            self.hold(torch.where(first == FIXED, second, torch.where(second == FIXED, first, FIXED)), why)

    def hold(self, labels: Labels | None, why: str) -> None:
        """Keep channels whole, with the reason; the name of the module that runs is put before it."""
        if labels is not None:
            self.record.holds.append((labels, f"{self.where()}: {why}"))

    def inexact(self, labels: Labels | None, why: str) -> None:
        """Note that removing these channels is not the same as zeroing what is read from them."""
        if labels is not None:
            self.record.inexact.append((labels, f"{self.where()}: {why}"))

    def produce(self, labels: Labels | None) -> None:
        """Note that these positions of a weight make channels."""
        if labels is not None:
            self.record.produced.append(labels)

    def read(self, labels: Labels | None) -> None:
        """Note that these positions of a weight read channels."""
        if labels is not None:
            self.record.read.append(labels)

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

    def inside(self, function: Callable[..., Any]) -> bool:
        """Tell whether a torch function that was asked to be watched is running."""
        return function in self.scope.running

    def where(self) -> str:
        """Name the module that runs now, found on the call stack."""
        frame = sys._getframe(1)
        while frame is not None:
            runner = frame.f_locals.get("self")
            if isinstance(runner, nn.Module) and id(runner) in self.names:
                return self.names[id(runner)] or type(runner).__name__
            frame = frame.f_back  # type: ignore[assignment]
        return "the model"

    # -- the forward pass ------------------------------------------------------------------------------------------

    def __enter__(self) -> "Tracer":
        super().__enter__()
        self.scope.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.scope.__exit__(*raised)
        super().__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.running = Call(func, args, kwargs, None)
        output = func(*args, **kwargs)
        call = Call(func, args, kwargs, output)
        name = str(func.overloadpacket)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if tensors and all(getattr(t, "_is_weight", False) for t in tensors):
            for made in tree_leaves(output):
                if isinstance(made, Tensor):
                    made._is_weight = True  # type: ignore[attr-defined]
        if any(self.all_labels(t) for t in tensors):
            self._rule(name, func)(self, call)
        cost = self.costs.get(name)
        if cost is not None:
            cost(self, call)
        self.running = None
        return output

    def _rule(self, name: str, func: Any) -> Callable[["Tracer", Call], None]:
        rule = self.rules.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self.rules["pointwise"]
        return rule or self.rules["unknown"]


def line_of(raised: BaseException) -> str:
    """Name the innermost line outside torch that an exception came through, as ``file.py:12``."""
    line, trace = "", raised.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_TORCH_FOLDER) and os.sep + "lightning_prune" + os.sep + "graph" not in file:
            line = f"{os.path.basename(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
