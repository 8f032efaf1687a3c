"""A trial: an optimizer steps on small tensors in place of its parameters, and shows what its state is about.

Shapes alone do not tell: a matrix of outputs by outputs beside a square weight looks like its momentum. But momentum
follows the weight: where the rows of a weight and of its gradients are moved, those of the momentum are moved too.
"""

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Verdicts = dict[Key, bool]
"""Whether a state follows its parameter, for states that tell."""

_STEPS = 3
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
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = _verdicts(partial(Trial, family, tensors, fresh=True), kept)
        going_on = _verdicts(partial(Trial, family, tensors, fresh=False), kept)
    return {**going_on, **fresh}


def _verdicts(make: Callable[..., "Trial"], kept: Index) -> Verdicts:
    try:
        trial = make()
        states = trial.run()
    except Exception:  # it needs more than small tensors, so that nothing is shown
        return {}
    verdicts: Verdicts = {}
    for axis in sorted({axis for name in trial.small for axis in kept[name]}):
        moved = _Moved(axis, {name for name in trial.small if axis in kept[name]})
        for key, follows in moved.compare(states, make(moved=moved).run()).items():
            verdicts[key] = verdicts.get(key, True) and follows
    if not all(verdicts.values()):
        again = make().run(seed=1)  # what depends on chance does not tell either
        verdicts = {key: follows for key, follows in verdicts.items() if follows or _near(states[key], again[key])}
    if all(verdicts.values()):
        _go_on(trial, kept)
    return verdicts


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
        return tensor.roll(1, self.axis) if name in self.names else tensor

    def compare(self, states: dict[Key, Tensor], moved: dict[Key, Tensor]) -> Verdicts:
        """Tell of each state that has become anything whether it was moved with its parameter."""
        verdicts = {}
        for key, state in states.items():
            if key[1] in self.names and key in moved and _tells(state):
                verdicts[key] = _near(self.move(key[1], state), moved[key])
        return verdicts


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
        self.small = {name: self._small(name, tensor) for name, tensor in tensors.items()}
        small = {tensor: self.small[name] for name, tensor in tensors.items()}
        self.family = _copies(family, small, () if fresh else tensors.values())

    def run(self, seed: int = 0) -> dict[Key, Tensor]:
        """Step some times; return the state in the shape of parameters.

        Args:
            seed: Of the global random generators, which the optimizer may draw from.
        """
        torch.manual_seed(seed)
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
        step = type(self.family[0]).step
        closures: list[Any] = [closure] if len(inspect.signature(step).parameters) > 1 else []
        step(self.family[0], *closures)

    def _small(self, name: str, tensor: Tensor) -> nn.Parameter:
        shape = _small_shape(tuple(tensor.shape))
        drawn = self._drawn(name, tensor.new_empty(shape))
        return nn.Parameter(drawn, requires_grad=tensor.is_floating_point() or tensor.is_complex())

    def _drawn(self, name: str, like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=self.random).to(like)
        return numbers if self.moved is None else self.moved.move(name, numbers)


def _go_on(trial: Trial, kept: Index) -> None:
    """Prune the small tensors of a trial and step again; raise an ArithmeticError if that fails."""
    for name, tensor in trial.small.items():
        fewer = {axis: torch.arange(tensor.shape[axis] // 2) for axis in kept[name]}
        for replacement in [*sliced_state(trial.family, tensor, fewer), of_slices(tensor, fewer)]:
            replacement.put()
    try:
        trial.step()
    except Exception as error:
        raise ArithmeticError(str(error)) from error


def _small_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a small shape whose axes are in the same order of size, those of one size again of one size."""
    sizes = sorted(set(shape))
    return tuple(min(size, 4 + 2 * sizes.index(size)) for size in shape)


def _copies(family: Sequence[Optimizer], small: Mapping[Tensor, Tensor], known: Iterable[Tensor]) -> list[Optimizer]:
    """Copy optimizers that refer to each other, with small tensors in place of parameters, of which some are known."""
    copies = [type(optimizer).__new__(type(optimizer)) for optimizer in family]
    memo: dict[int, Any] = {id(optimizer): each for optimizer, each in zip(family, copies, strict=True)}
    for _, leaf in search([("", [vars(optimizer) for optimizer in family])]):
        if leads_outside(leaf):
            memo[id(leaf)] = object()  # an optimizer that needs it does not get far
        elif isinstance(leaf, Tensor) and leaf.numel() == 1:
            memo[id(leaf)] = leaf.detach().clone()  # one in a graph refuses to be copied
    parameters = [parameter for optimizer in family for parameter in _parameters(optimizer)]
    memo.update({id(parameter): nn.Parameter(torch.zeros(1)) for parameter in parameters})
    memo.update({id(tensor): each for tensor, each in small.items()})
    for optimizer in family:
        state: dict[Any, Any] = defaultdict(dict)
        state.update({small[tensor]: _zeroed(optimizer, tensor, small[tensor], memo) for tensor in known})
        memo[id(optimizer.state)] = state
    for optimizer, each in zip(family, copies, strict=True):
        vars(each).update(_copied_attributes(optimizer, memo))
        _train_only(each, {id(tensor) for tensor in small.values()})
    return copies


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    yield from (parameter for group in optimizer.param_groups for parameter in group["params"])
    yield from (key for key in optimizer.state if isinstance(key, Tensor))


def _copied_attributes(optimizer: Optimizer, memo: dict[int, Any]) -> dict[str, Any]:
    """Copy the attributes of an optimizer, but for what steps with the original: a step that a schedule sets, hooks."""
    attributes = {name: value for name, value in vars(optimizer).items() if name != "step"}
    hooks = {name for name in attributes if name.startswith("_optimizer_") and name.endswith("hooks")}
    return {name: OrderedDict() if name in hooks else copy.deepcopy(attributes[name], memo) for name in attributes}


def _zeroed(optimizer: Optimizer, tensor: Tensor, small: Tensor, memo: dict[int, Any]) -> dict[Any, Any]:
    """Return what an optimizer knows of a parameter for a small one, with zeros for what has its shape."""
    zeroed = {}
    with_axes = sliceable(optimizer, tensor)
    for key, value in optimizer.state.get(tensor, {}).items():
        if key in with_axes:
            shape = [min(sizes) for sizes in zip(value.shape, small.shape, strict=True)]
            zeroed[key] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        else:
            zeroed[key] = copy.deepcopy(value, memo)
    return zeroed


def _train_only(optimizer: Optimizer, wanted: set[int]) -> None:
    """Take all other parameters out of the groups of an optimizer, and groups that are then empty."""
    for group in optimizer.param_groups:
        indices = [index for index, parameter in enumerate(group["params"]) if id(parameter) in wanted]
        for name in {"params", "param_names"} & group.keys():
            group[name] = [group[name][index] for index in indices]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _tells(state: Tensor) -> bool:
    """Tell whether a state has become anything."""
    largest = state.abs().max()
    return bool(largest > 0) and bool(largest.isfinite())


def _near(state: Tensor, other: Tensor) -> bool:
    if state.shape != other.shape:
        return False
    return bool((state - other).abs().max() <= _TOLERANCE * state.abs().max())
