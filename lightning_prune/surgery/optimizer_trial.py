"""A trial: an optimizer steps on small tensors in place of its parameters, and shows what its state is about.

Shapes alone do not tell: a matrix of outputs by outputs beside a square weight looks like its momentum. But momentum
follows the weight: where the rows of a weight and of its gradients are moved, those of the momentum are moved too.
"""

import copy
import inspect
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.pruning_plan import Index
from lightning_prune.surgery.optimizer_contents import leads_outside, search
from lightning_prune.surgery.optimizer_state import sliceable, sliced_state
from lightning_prune.surgery.replacing import of_slices

__all__ = ["Trial", "Verdicts", "try_out"]

Key = tuple[int, str, Any]  # which optimizer of a family, name of a parameter, key of its state
States = dict[Key, Tensor]
Verdicts = dict[Key, bool]
"""Whether a state follows its parameter, for states that tell."""

_STEPS = 10  # some look back every fifth step
_TOLERANCE = 1e-2  # of the largest number; what follows something else is as far off as it is large


def try_out(family: Sequence[Optimizer], tensors: Mapping[str, Tensor], kept: Index) -> Verdicts:
    """Let an optimizer step on small tensors, and then go on after channels of these are pruned.

    It is tried twice: as if it had not met its parameters yet, and with the state that it has of them. The optimizer
    itself, its parameters and the state of the random generators are as before.

    Args:
        family: An optimizer, and then those inside it.
        tensors: The parameters that lose channels, by dotted name.
        kept: The positions of these to keep, by the same names.

    Raises:
        ArithmeticError: If the optimizer goes on no more.
    """
    verdicts: Verdicts = {}
    with _unnoticed(tensors.values()):
        for fresh in (True, False):
            make = partial(Trial, family, tensors, fresh)
            try:
                trial = make()
                shown = _compared(make, trial.run(), kept)
            except Exception:  # it needs more than small tensors, so that nothing is shown
                continue
            for key, follows in shown.items():
                verdicts[key] = follows and verdicts.get(key, True)
            if all(verdicts.values()):
                _go_on(trial, kept)
    return verdicts


@contextmanager
def _unnoticed(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the state of the random generators afterwards, and be silent."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(_cuda_devices(tensors)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)


def _cuda_devices(tensors: Iterable[Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors if tensor.is_cuda}


# -- what a trial shows ------------------------------------------------------------------------------------------------


class _Moved(NamedTuple):
    """Tensors whose positions along an axis are moved on by one.

    Attributes:
        axis: The axis.
        names: Names of parameters.
    """

    axis: int
    names: set[str]

    def move(self, name: str, tensor: Tensor) -> Tensor:
        """Move what belongs to a parameter."""
        if name not in self.names:
            return tensor
        return tensor.roll(1, self.axis)


def _compared(make: Callable[..., "Trial"], states: States, kept: Index) -> Verdicts:
    """Compare states with those of trials in which everything is moved along one axis, for each axis in turn."""
    verdicts: Verdicts = {}
    for moved in _moves(kept):
        moved_states = make(moved=moved).run()
        for key, state in states.items():
            name = key[1]
            if name in moved.names and _has_become_something(state):
                follows = _near(moved.move(name, state), moved_states[key])
                verdicts[key] = follows and verdicts.get(key, True)
    if all(verdicts.values()):
        return verdicts
    again = make().run(seed=1)  # what depends on chance does not tell
    return {key: follows for key, follows in verdicts.items() if follows or _near(states[key], again[key])}


def _moves(kept: Index) -> list[_Moved]:
    names = defaultdict(set)
    for name, axes in kept.items():
        for axis in axes:
            names[axis].add(name)
    return [_Moved(axis, names[axis]) for axis in sorted(names)]


def _has_become_something(state: Tensor) -> bool:
    largest = state.abs().max()
    return bool(largest > 0) and bool(largest.isfinite())


def _near(state: Tensor, other: Tensor) -> bool:
    if state.shape != other.shape:
        return False
    largest = state.abs().max()
    difference = (state - other).abs().max()
    return bool(difference <= _TOLERANCE * largest)


def _go_on(trial: "Trial", kept: Index) -> None:
    """Prune the small tensors of a trial and step again; raise an ArithmeticError if that fails."""
    for name, tensor in trial.small.items():
        fewer = {axis: torch.arange(tensor.shape[axis] // 2) for axis in kept[name]}
        smaller = [*sliced_state(trial.family, tensor, fewer), of_slices(tensor, fewer)]
        for replacement in smaller:
            replacement.put()
    try:
        trial.step()
    except Exception as error:
        raise ArithmeticError(str(error)) from error


# -- the trial itself --------------------------------------------------------------------------------------------------


class Trial:
    """A copy of an optimizer that steps on small tensors in place of its parameters.

    Counters and settings are those of the optimizer.

    Args:
        family: The optimizer, and then those inside it.
        tensors: The parameters to have in it, by dotted name.
        fresh: Whether the optimizer knows nothing of the tensors yet; else it knows what it does of the parameters,
            with zeros for what has their shape.
        moved: Which of the small tensors are moved.
    """

    def __init__(
        self,
        family: Sequence[Optimizer],
        tensors: Mapping[str, Tensor],
        fresh: bool,
        moved: _Moved | None = None,
    ) -> None:
        self.moved = moved
        self.random = torch.Generator().manual_seed(0)
        self.devices = _cuda_devices(tensors.values())
        self.small = {name: self._small(name, tensor) for name, tensor in tensors.items()}
        pairs = [(tensor, self.small[name]) for name, tensor in tensors.items()]
        self.family = _copies(family, pairs, fresh)

    def run(self, seed: int = 0) -> States:
        """Step some times; return the state in the shape of parameters.

        Args:
            seed: Of the random generators that the optimizer may draw from.
        """
        torch.default_generator.manual_seed(seed)
        for device in self.devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        for _ in range(_STEPS):
            self.step()
        states = {}
        for index, optimizer in enumerate(self.family):
            for name, parameter in self.small.items():
                for key, value in sliceable(optimizer, parameter).items():
                    states[index, name, key] = value.to_dense().clone()
        return states

    def step(self) -> None:
        """Step once, with random gradients."""
        gradients = {name: self._drawn(name, parameter) for name, parameter in self.small.items()}

        def closure() -> Tensor:
            for name, gradient in gradients.items():
                self.small[name].grad = gradient.clone()
            return torch.ones(())

        closure()
        optimizer = self.family[0]
        step: Callable[..., Any] = type(optimizer).step
        takes_closure = len(inspect.signature(step).parameters) > 1
        if takes_closure:
            step(optimizer, closure)
        else:
            step(optimizer)

    def _small(self, name: str, tensor: Tensor) -> nn.Parameter:
        shape = _small_shape(tensor.shape)
        numbers = self._drawn(name, tensor.new_empty(shape))
        return nn.Parameter(numbers)

    def _drawn(self, name: str, like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=self.random).to(like)
        if self.moved is None:
            return numbers
        return self.moved.move(name, numbers)


def _small_shape(shape: Sequence[int]) -> list[int]:
    """Return a small shape whose axes are in the same order of size, those of one size again of one size."""
    sizes = sorted(set(shape))
    return [min(size, 4 + 2 * sizes.index(size)) for size in shape]


# -- copies of optimizers ----------------------------------------------------------------------------------------------


def _copies(family: Sequence[Optimizer], pairs: Sequence[tuple[Tensor, Tensor]], fresh: bool) -> list[Optimizer]:
    """Copy optimizers that refer to each other, with small tensors in place of parameters."""
    memo = _stand_ins(family)
    for parameter, small in pairs:
        memo[id(parameter)] = small
    copies = []
    for optimizer in family:
        copied = type(optimizer).__new__(type(optimizer))
        memo[id(optimizer)] = copied
        copies.append(copied)
        state: dict[Any, Any] = defaultdict(dict)
        if not fresh:
            for parameter, small in pairs:
                state[small] = _zeroed(optimizer, parameter, small, memo)
        memo[id(optimizer.state)] = state
    for optimizer, copied in zip(family, copies, strict=True):
        vars(copied).update(_copied_attributes(optimizer, memo))
    for copied in copies:  # whose groups may be those of another one
        _train_only(copied, {id(small) for _, small in pairs})
    return copies


def _stand_ins(family: Sequence[Optimizer]) -> dict[int, Any]:
    """Return what is in copies of optimizers in place of what is not to be copied, by its ``id``."""
    memo: dict[int, Any] = {}
    for _, leaf in search([("", [vars(optimizer) for optimizer in family])]):
        if leads_outside(leaf):
            memo[id(leaf)] = object()  # an optimizer that needs it does not get far
        elif isinstance(leaf, Tensor) and leaf.numel() == 1:
            memo[id(leaf)] = leaf.detach().clone()  # one in a graph refuses to be copied
    for optimizer in family:
        for parameter in _parameters(optimizer):
            memo[id(parameter)] = nn.Parameter(torch.zeros(1))
    return memo


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for key in optimizer.state:
        if isinstance(key, Tensor):
            yield key


def _copied_attributes(optimizer: Optimizer, memo: dict[int, Any]) -> dict[str, Any]:
    """Copy the attributes of an optimizer, but for what steps with the original: a step that a schedule sets, hooks."""
    copied: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("hooks"):
            copied[name] = OrderedDict()
        elif name != "step":
            copied[name] = copy.deepcopy(value, memo)
    return copied


def _zeroed(optimizer: Optimizer, parameter: Tensor, small: Tensor, memo: dict[int, Any]) -> dict[Any, Any]:
    """Return what an optimizer knows of a parameter for a small one, with zeros for what has its shape."""
    zeroed: dict[Any, Any] = {}
    with_axes = sliceable(optimizer, parameter)
    for key, value in optimizer.state.get(parameter, {}).items():
        if key in with_axes:
            sizes = zip(value.shape, small.shape, strict=True)
            shape = [min(size, small_size) for size, small_size in sizes]
            zeroed[key] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        else:
            zeroed[key] = copy.deepcopy(value, memo)
    return zeroed


def _train_only(optimizer: Optimizer, wanted: set[int]) -> None:
    """Take all other parameters out of the groups of an optimizer, and groups that are then empty."""
    filled = []
    for group in optimizer.param_groups:
        indices = [index for index, parameter in enumerate(group["params"]) if id(parameter) in wanted]
        for name in {"params", "param_names"} & group.keys():
            group[name] = [group[name][index] for index in indices]
        if indices:
            filled.append(group)
    optimizer.param_groups[:] = filled
