"""Replay of a pass from a point in its middle: what it had computed by then is handed out instead.

Only operations are known here, not candidates: which point is right for a candidate is decided in `jobs`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["DivergedError", "Replay"]

Pass = Callable[[], Any]


class DivergedError(Exception):
    """A pass has not done the same operations as the one before."""


class _ReachedError(BaseException):
    """The boundary is reached. This is no failure, hence not to be caught as an ``Exception``."""


@dataclass(frozen=True)
class _Blank:
    """Stand-in for a tensor that nothing uses behind the boundary."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: Tensor) -> "_Blank":
        shape = tuple(tensor.shape)
        return cls(shape, tensor.stride(), tensor.dtype, tensor.device)


class _Watched:
    """A tensor for as long as somebody else refers to it, then a blank."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)
        self._blank = _Blank.like(tensor)

    def settle(self) -> Tensor | _Blank:
        tensor = self._tensor()
        return self._blank if tensor is None else tensor


@dataclass
class _Step:
    """One operation before the boundary, and what it returned.

    Attributes:
        operation: The operation.
        results: Tensors, blanks and numbers.
        spec: How they are nested.
    """

    operation: Any
    results: list[Any]
    spec: TreeSpec


HandOut = Callable[[Tensor | _Blank], Tensor]


class Replay:
    """A pass that can start at a boundary in its middle.

    A pass is a sequence of tensor operations, always the same ones. `advance` runs it up to the boundary and keeps the
    tensors that are alive at this moment. `run` skips the operations up to there: these tensors are handed out where
    they would be computed, and memory without content where a tensor would be computed that nothing uses any more.
    Python code runs as always, so nothing is asked of the model but that it does the same operations each time.

    Args:
        run: The pass, without gradients and without random numbers.
        operations: The operations that it does, as `trace_operators` returned them.
        samples: Number of samples in its batch.

    Example:
        >>> from lightning_prune.candidates.operator_trace import trace_operators
        >>> weight = torch.ones(2)
        >>> def double():
        ...     return (torch.ones(2) + 1) * weight
        >>> replay = Replay(double, trace_operators(double, {}).operations, samples=2)
        >>> replay.advance(2)  # before the multiplication
        >>> weight = torch.tensor([1.0, 3.0])
        >>> replay.run()
        tensor([2., 6.])
    """

    def __init__(self, run: Pass, operations: Sequence[Any], samples: int) -> None:
        self._pass = run
        self._operations = operations
        self._scratch = _Scratch()
        self._repeated = _Repeated(samples)
        self._steps: list[_Step] = []
        # Ids of the kept tensors that the pass writes into behind the boundary; None before a run has shown them.
        self._overwritten: set[int] | None = None

    @property
    def boundary(self) -> int:
        """Number of operations that are skipped."""
        return len(self._steps)

    def advance(self, boundary: int) -> None:
        """Move the boundary on.

        Args:
            boundary: Number of operations to skip from now on; at least as many as before.

        Raises:
            DivergedError: If the pass has no more operations, or does others than before.
        """
        known = self.boundary
        if boundary == known:
            return
        if boundary >= len(self._operations):
            raise DivergedError(f"the pass has no operation {boundary}")
        expected = self._operations[known : boundary + 1]
        recorder = _Recorder(self._steps, self._hand_out_itself, expected)
        try:
            with recorder:
                self._pass()
        except _ReachedError:
            self._steps = recorder.steps_at_boundary
        else:
            raise DivergedError(f"the pass has ended before operation {boundary}")
        self._repeated.forget()
        self._overwritten = None

    def run(self, run: Pass | None = None, repeats: int = 1) -> Any:
        """Run the pass from the boundary on.

        Args:
            run: What to run, if not the pass itself; the same operations up to the boundary.
            repeats: How often the batch of that run contains the batch of the pass.

        Returns:
            What the run returns.

        Raises:
            DivergedError: If the run does other operations than the pass up to the boundary.
        """
        if not self._steps:
            return (run or self._pass)()
        player = _Player(self._steps, lambda kept: self._hand_out(kept, repeats))
        with player:
            result = (run or self._pass)()
        if player.position != len(self._steps):
            raise DivergedError(f"the pass has ended after {player.position} operations")
        if self._overwritten is None:
            self._overwritten = player.overwritten
        return result

    def _hand_out_itself(self, kept: Tensor | _Blank) -> Tensor:
        return self._scratch.fill(kept) if isinstance(kept, _Blank) else kept

    def _hand_out(self, kept: Tensor | _Blank, repeats: int) -> Tensor:
        """Return what stands in for a result of the pass; a copy if it will be written into."""
        repeated = repeats > 1 and self._repeated.has_batch_axis(kept)
        if isinstance(kept, _Blank):
            return self._scratch.fill(kept, repeats if repeated else 1)
        tensor = self._repeated.times(kept, repeats) if repeated else kept
        may_be_overwritten = self._overwritten is None or id(kept) in self._overwritten
        return tensor.clone() if may_be_overwritten else tensor


class _Repeated:
    """Kept tensors, repeated along the axis of the samples.

    Args:
        samples: Number of samples in the batch of the pass.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._tensors: dict[tuple[int, int], Tensor] = {}  # by id of the kept tensor and number of repeats

    def has_batch_axis(self, kept: Tensor | _Blank) -> bool:
        """Tell whether the first axis has the length of a batch; that it is one is found out by trying."""
        return len(kept.shape) > 0 and kept.shape[0] == self._samples

    def times(self, kept: Tensor, repeats: int) -> Tensor:
        """Return a tensor repeated: (repeats * samples, ...)."""
        key = (id(kept), repeats)
        repeated = self._tensors.get(key)
        if repeated is None:
            repeated = torch.cat([kept] * repeats)
            self._tensors[key] = repeated
        return repeated

    def forget(self) -> None:
        self._tensors.clear()


class _Scratch:
    """Memory without content, one for each type of number and device, which all tensors in it share."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def fill(self, blank: _Blank, repeats: int = 1) -> Tensor:
        """Return a tensor of the size and strides of a blank that is repeated along the first axis."""
        shape = blank.shape
        if repeats > 1:
            shape = (shape[0] * repeats, *shape[1:])
        count = _extent(shape, blank.strides)
        key = (blank.dtype, blank.device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < count:
            memory = torch.empty(count, dtype=blank.dtype, device=blank.device)
            self._memory[key] = memory
        return memory.as_strided(shape, blank.strides)


class _Player(TorchDispatchMode):
    """Skip the known steps, and do the rest.

    Args:
        steps: The steps to skip.
        hand_out: Given what a step has kept, returns the tensor to hand out.
    """

    def __init__(self, steps: list[_Step], hand_out: HandOut) -> None:
        super().__init__()
        self.steps = steps
        self.hand_out = hand_out
        self.position = 0
        self.handed_out: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by id of the kept tensor
        self.overwritten: set[int] = set()  # ids of kept tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.position == len(self.steps):
            return self.go_on(func, args, kwargs or {})
        step = self.steps[self.position]
        if step.operation is not func:
            raise DivergedError(f"operation {self.position} has been {step.operation} and is now {func}")
        self.position += 1
        results = [self._stand_in(kept) for kept in step.results]
        return tree_unflatten(results, step.spec)

    def go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation behind the boundary; note which of the tensors that were handed out it writes into."""
        if func._schema.is_mutable:
            self._note_overwritten(args, kwargs)
        return func(*args, **kwargs)

    def _note_overwritten(self, args: Any, kwargs: Any) -> None:
        values = tree_leaves((args, kwargs))
        touched = {_storage(value) for value in values if isinstance(value, Tensor)}
        for key, tensor in self.handed_out.items():
            if _storage(tensor) in touched:
                self.overwritten.add(key)

    def _stand_in(self, leaf: Any) -> Any:
        """Return what an operation that is skipped returns in one place."""
        if isinstance(leaf, _Blank):
            return self.hand_out(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = self.handed_out.get(id(leaf))
        if tensor is None:
            # A new alias each time: views must be new to autograd, and an alias that is not referred to any more shows
            # that the tensor is not needed any more.
            tensor = self.hand_out(leaf).detach()
            self.handed_out[id(leaf)] = tensor
        return tensor


class _Recorder(_Player):
    """Skip the known steps, record those from there to the boundary, and stop.

    Args:
        steps: The steps to skip.
        hand_out: As for `_Player`.
        expected: The operations from there to the one behind the boundary.
    """

    def __init__(self, steps: list[_Step], hand_out: HandOut, expected: Sequence[Any]) -> None:
        super().__init__(steps, hand_out)
        self.steps_at_boundary: list[_Step] = []
        self._expected = expected
        self._recorded: list[_Step] = []

    def go_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        count = len(self._recorded)
        if func is not self._expected[count]:
            raise DivergedError(f"the operation has been {self._expected[count]} and is now {func}")
        if count == len(self._expected) - 1:
            steps = self.steps + self._recorded
            self.steps_at_boundary = [self._settled(step) for step in steps]
            raise _ReachedError
        result = func(*args, **kwargs)
        results, spec = tree_flatten(result)
        watched = [_Watched(leaf) if isinstance(leaf, Tensor) else leaf for leaf in results]
        self._recorded.append(_Step(func, watched, spec))
        return result

    def _settled(self, step: _Step) -> _Step:
        """Keep of a step what somebody else refers to at this moment."""
        results = [self._settled_result(result) for result in step.results]
        return _Step(step.operation, results, step.spec)

    def _settled_result(self, leaf: Any) -> Any:
        if isinstance(leaf, _Watched):
            return leaf.settle()
        if isinstance(leaf, Tensor):
            alias = self.handed_out.get(id(leaf))
            return _Blank.like(leaf) if alias is None else alias
        return leaf


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many numbers lie between the first and the last one of a tensor in memory, these two included."""
    last = 0
    for size, stride in zip(shape, strides, strict=True):
        last += (size - 1) * stride
    return last + 1


def _storage(tensor: Tensor) -> int:
    """Return what is the same for tensors that share their memory."""
    return tensor.untyped_storage()._cdata
