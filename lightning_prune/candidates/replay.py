"""Run the same pass again from a point in its middle: what it had computed by then is handed out instead."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Course", "DivergedError", "Replay", "observe"]


class DivergedError(Exception):
    """A pass has not done the same operations as the one before."""


class Replay:
    """A pass that can start at a boundary in its middle.

    A pass is a sequence of tensor operations, always the same ones. `advance` runs it up to the boundary and keeps the
    tensors that are alive at this moment. `run` skips the operations up to there: these tensors are handed out where
    they would be computed, and memory without content where a tensor would be computed that nobody reads any more.
    Python code runs as always, so nothing is asked of the model but that it does the same operations each time.

    Args:
        run: The pass, without gradients and without random numbers.
        operations: The operations that it does, as `observe` returned them.
        examples: Number of examples in its batch.

    Example:
        >>> weight = torch.ones(2)
        >>> def double():
        ...     return (torch.ones(2) + 1) * weight
        >>> replay = Replay(double, observe(double, {}).operations, examples=2)
        >>> replay.advance(2)  # before the multiplication
        >>> weight = torch.tensor([1.0, 3.0])
        >>> replay.run()
        tensor([2., 6.])
    """

    def __init__(self, run: Callable[[], Any], operations: Sequence[Any], examples: int) -> None:
        self.pass_ = run
        self.operations = operations
        self.examples = examples
        self._steps: list[_Step] = []
        self._repeated: dict[tuple[int, int], Tensor] = {}
        self._written: set[int] | None = None  # which of the kept tensors are written into behind the boundary
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def advance(self, boundary: int) -> None:
        """Move the boundary on.

        Args:
            boundary: Number of operations to skip from now on; at least as many as before.

        Raises:
            DivergedError: If the pass has no more operations, or does others than before.
        """
        if boundary == len(self._steps):
            return
        if boundary >= len(self.operations):
            raise DivergedError(f"the pass has no operation {boundary}")
        ahead = self.operations[len(self._steps) : boundary + 1]
        recorder = _Recorder(self._steps, ahead, lambda kept: self._kept_or_blank(kept, 1, lambda tensor: tensor))
        try:
            with recorder:
                self.pass_()
        except _Reached:
            self._steps, self._repeated, self._written = recorder.settled, {}, None
        else:
            raise DivergedError(f"the pass has ended before operation {boundary}")

    def run(self, run: Callable[[], Any] | None = None, repeats: int = 1) -> Any:
        """Run the pass from the boundary on.

        Args:
            run: What to run, if not the pass itself; the same operations up to the boundary.
            repeats: How often the batch of that run holds the batch of the pass.

        Returns:
            What the run returns.

        Raises:
            DivergedError: If the run does other operations than the pass up to the boundary.
        """
        written = self._written

        def own(kept: Tensor) -> Tensor:
            return kept.clone() if written is None or id(kept) in written else kept

        player = _Player(self._steps, lambda kept: self._kept_or_blank(kept, repeats, own))
        with player:
            result = (run or self.pass_)()
        if player.position != len(self._steps):
            raise DivergedError(f"the pass has ended after {player.position} operations")
        if written is None:
            self._written = player.written
        return result

    def _kept_or_blank(self, kept: "Tensor | _Blank", repeats: int, own: Callable[[Tensor], Tensor]) -> Tensor:
        batched = repeats > 1 and len(kept.shape) > 0 and kept.shape[0] == self.examples
        if isinstance(kept, _Blank):
            return self._empty(kept, repeats if batched else 1)
        if not batched:
            return own(kept)
        key = (id(kept), repeats)
        if key not in self._repeated:
            self._repeated[key] = torch.cat([kept] * repeats)
        repeated = self._repeated[key]
        return repeated if own(kept) is kept else repeated.clone()

    def _empty(self, blank: "_Blank", repeats: int) -> Tensor:
        """Return a tensor of the right size and strides in memory that all of them share."""
        shape = (blank.shape[0] * repeats, *blank.shape[1:]) if repeats > 1 else blank.shape
        numbers = 1 + sum((size - 1) * step for size, step in zip(shape, blank.strides, strict=True))
        key = (blank.dtype, blank.device)
        if key not in self._scratch or self._scratch[key].numel() < numbers:
            self._scratch[key] = torch.empty(numbers, dtype=blank.dtype, device=blank.device)
        return self._scratch[key].as_strided(shape, blank.strides)


@dataclass(frozen=True)
class Course:
    """What a pass does.

    Attributes:
        result: What it returns.
        operations: Its operations, in order.
        first_read: Number of operations before the first one that reads each tensor, by name; for tensors that are
            never read the number of all operations.
        reads: Number of operations that read each tensor, by name.
    """

    result: Any
    operations: list[Any]
    first_read: dict[str, int]
    reads: dict[str, int]


def observe(run: Callable[[], Any], tensors: Mapping[str, Tensor]) -> Course:
    """Run a pass once, and tell what it does.

    Args:
        run: The pass.
        tensors: The tensors to watch, by name.
    """
    reader = _Reader({id(tensor): name for name, tensor in tensors.items()})
    with reader:
        result = run()
    first_read = {name: min(reader.read_by[name], default=len(reader.operations)) for name in tensors}
    reads = {name: len(reader.read_by[name]) for name in tensors}
    return Course(result, reader.operations, first_read, reads)


class _Reached(BaseException):
    """The boundary is reached. No error, hence not to be caught as one."""


@dataclass(frozen=True)
class _Blank:
    """Stands for a tensor that nothing reads behind the boundary."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Watched:
    """A tensor for as long as somebody else holds it, then a blank."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = ref(tensor)
        self.blank = _Blank(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def settle(self) -> Tensor | _Blank:
        tensor = self.tensor()
        return self.blank if tensor is None else tensor


@dataclass
class _Step:
    """One operation before the boundary, and what it returned: tensors, blanks, numbers."""

    operation: Any
    leaves: list[Any]
    spec: TreeSpec


class _Player(TorchDispatchMode):
    """Skip the known steps, and do the rest."""

    def __init__(self, steps: list[_Step], hand_out: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.steps, self.hand_out = steps, hand_out
        self.position = 0
        self.given: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by `id` of the kept tensor
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.position == len(self.steps):
            return self.go_on(func, args, kwargs or {})
        step = self.steps[self.position]
        if step.operation is not func:
            raise DivergedError(f"operation {self.position} has been {step.operation} and is now {func}")
        self.position += 1
        return tree_unflatten([self._give(leaf) for leaf in step.leaves], step.spec)

    def go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation behind the boundary; note which of the tensors that were handed out it writes into."""
        if func._schema.is_mutable:
            storages = {
                leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
            }
            self.written.update(key for key, given in self.given.items() if given.untyped_storage()._cdata in storages)
        return func(*args, **kwargs)

    def _give(self, leaf: Any) -> Any:
        if isinstance(leaf, _Blank):
            return self.hand_out(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        given = self.given.get(id(leaf))
        if given is None:
            # A new name each time: views must be new to autograd, and whose name is gone is not needed any more.
            given = self.given[id(leaf)] = self.hand_out(leaf).detach()
        return given


class _Recorder(_Player):
    """Skip the known steps, note those from there to the boundary, and stop."""

    def __init__(self, steps: list[_Step], ahead: Sequence[Any], hand_out: Callable[[Any], Tensor]) -> None:
        super().__init__(steps, hand_out)
        self.ahead = ahead  # the operations from there to the one behind the boundary
        self.new: list[_Step] = []
        self.settled: list[_Step] = []

    def go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not self.ahead[len(self.new)]:
            raise DivergedError(f"the operation has been {self.ahead[len(self.new)]} and is now {func}")
        if len(self.new) == len(self.ahead) - 1:
            self.settled = [_Step(step.operation, [*map(self._settle, step.leaves)], step.spec) for step in self._all()]
            raise _Reached
        result = func(*args, **kwargs)
        leaves, spec = tree_flatten(result)
        self.new.append(_Step(func, [_Watched(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))
        return result

    def _all(self) -> list[_Step]:
        return self.steps + self.new

    def _settle(self, leaf: Any) -> Any:
        """Keep what somebody else holds at this moment."""
        if isinstance(leaf, _Watched):
            return leaf.settle()
        if isinstance(leaf, Tensor):
            given = self.given.get(id(leaf))
            return _Watched(leaf).blank if given is None else given
        return leaf


class _Reader(TorchDispatchMode):
    """Note operations, and which of them read each of some tensors."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.read_by: defaultdict[str, set[int]] = defaultdict(set)
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.names:
                self.read_by[self.names[id(leaf)]].add(len(self.operations))
        self.operations.append(func)
        return func(*args, **(kwargs or {}))
