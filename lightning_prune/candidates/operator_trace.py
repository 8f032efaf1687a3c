"""Operator trace of a pass: the tensor operations that it does, and which of them use some tensors.

It is taken once, from a pass of the model itself. What is done with it is the business of `jobs` and `replay`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OperatorTrace", "trace_operators"]


@dataclass(frozen=True)
class OperatorTrace:
    """What a pass does.

    Attributes:
        result: What it returns.
        operations: Its operations, in order.
        first_use: Number of operations before the first one that uses each tensor, by name; for tensors that are
            never used the number of all operations.
        uses: Number of operations that use each tensor, by name.
    """

    result: Any
    operations: list[Any]
    first_use: dict[str, int]
    uses: dict[str, int]


def trace_operators(run: Callable[[], Any], tensors: Mapping[str, Tensor]) -> OperatorTrace:
    """Run a pass once, and tell what it does.

    Args:
        run: The pass.
        tensors: The tensors to watch, by name.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(2), torch.ones(2)
        >>> trace = trace_operators(lambda: (x + 1) * weight, {"weight": weight})
        >>> [str(operation) for operation in trace.operations], trace.first_use
        (['aten.add.Tensor', 'aten.mul.Tensor'], {'weight': 1})
    """
    recorder = _UseRecorder(tensors)
    with recorder:
        result = run()
    never = len(recorder.operations)
    first_use = {}
    uses = {}
    for name in tensors:
        users = recorder.users[name]
        first_use[name] = min(users, default=never)
        uses[name] = len(users)
    return OperatorTrace(result, recorder.operations, first_use, uses)


class _UseRecorder(TorchDispatchMode):
    """Record operations, and the numbers of those that use each of some tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.users: defaultdict[str, set[int]] = defaultdict(set)
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.operations)
        for leaf in tree_leaves((args, kwargs)):
            name = self._names.get(id(leaf))
            if name is not None:
                self.users[name].add(number)
        self.operations.append(func)
        return func(*args, **(kwargs or {}))
