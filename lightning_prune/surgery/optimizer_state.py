"""Optimizer state: which of it belongs to the channels of a parameter, and what cannot be told apart."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_prune.surgery.replacing import Replacement, of_item
from lightning_prune.surgery.slicing import KeptByAxis, take

__all__ = ["check_optimizers", "check_state", "sliced_state"]


def check_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return the optimizers, without wrappers, and those inside them; refuse those whose state cannot be sliced.

    Args:
        optimizers: Optimizers, wrapped by Lightning or not.

    Raises:
        TypeError: If one is no optimizer, or its state cannot be sliced.
    """
    found = _with_inner(optimizers)
    for optimizer in found:
        _check_kind(optimizer)
    return found


def check_state(optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Raise a TypeError if nothing says which numbers of a state belong to a channel.

    Args:
        optimizers: What `check_optimizers` returned.
        tensors: The tensors that lose channels, by dotted name.
    """
    for optimizer in optimizers:
        for name, tensor in tensors.items():
            state = optimizer.state.get(tensor, {})
            for key, value in state.items():
                if not _can_be_sliced(value, tensor):
                    what = f"{type(optimizer).__name__} keeps {key!r} of {name!r}"
                    shapes = [str(tuple(leaf.shape)) for leaf in _larger_tensors(value)]
                    raise TypeError(
                        f"{what} in shape {' and '.join(shapes)}, where nothing says which numbers belong to which "
                        "channel; use another optimizer, such as SGD or AdamW."
                    )


def sliced_state(optimizers: Iterable[Optimizer], tensor: Tensor, kept: KeptByAxis) -> Iterator[Replacement]:
    """Slice what optimizers keep in the shape of a tensor; other state is kept.

    Args:
        optimizers: What `check_optimizers` returned.
        tensor: A parameter.
        kept: The positions of it to keep.

    Yields:
        What is to be put in place.
    """
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            if _has_axes_of(value, tensor):
                yield of_item(state, key, _sliced(value, tensor, kept))


def _sliced(value: Tensor, tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Slice a state along the axes that it has in full; those of factored states have length 1."""
    full_axes = [axis for axis in kept if value.shape[axis] == tensor.shape[axis]]
    return take(value, {axis: kept[axis] for axis in full_axes})


def _has_axes_of(value: Any, tensor: Tensor) -> bool:
    """Tell whether a state is a tensor with as many axes as a parameter, and is no single number."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return value.dim() == tensor.dim()


def _can_be_sliced(value: Any, tensor: Tensor) -> bool:
    """Tell whether a state has the shape of a parameter, but for axes of length 1, or nothing to slice."""
    if not _larger_tensors(value):
        return True
    if not _has_axes_of(value, tensor):
        return False
    sizes = zip(value.shape, tensor.shape, strict=True)
    return all(size in (1, full_size) for size, full_size in sizes)


def _larger_tensors(value: Any) -> list[Tensor]:
    """Return the tensors of more than one number in a state."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]


def _with_inner(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Add the optimizers that others step with, as in sharpness-aware minimisation."""
    found: list[Optimizer] = []
    waiting = [_unwrapped(optimizer) for optimizer in optimizers]
    for optimizer in waiting:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is no torch optimizer; pass the optimizers that train the model."
            )
        known = any(optimizer is other or optimizer.state is other.state for other in found)
        if not known:
            found.append(optimizer)
            waiting.extend(_inner(optimizer))  # looked at in this loop
    return found


def _inner(optimizer: Optimizer) -> Iterator[Any]:
    """Yield the optimizers among the attributes of one, and in collections there."""
    attributes = list(vars(optimizer).values())
    for leaf in tree_leaves(attributes):
        if isinstance(leaf, Optimizer):
            yield _unwrapped(leaf)


def _unwrapped(optimizer: Any) -> Any:
    """Return what a wrapper wraps that has no state of its own, such as Lightning's."""
    wrapped = getattr(optimizer, "optimizer", optimizer)
    shares_state = getattr(wrapped, "state", None) is getattr(optimizer, "state", None)
    if isinstance(optimizer, Optimizer) and not shares_state:
        return optimizer
    return wrapped


def _check_kind(optimizer: Optimizer) -> None:
    """Raise a TypeError if the state of an optimizer cannot be sliced, whatever the parameters."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} keeps its history for all parameters in one vector, which cannot lose channels; use another "
            "optimizer, such as SGD or AdamW."
        )
    local = getattr(optimizer, "optim", None)  # of a ZeroRedundancyOptimizer
    if isinstance(local, Optimizer) and local.state is not optimizer.state:
        raise TypeError(
            f"{name} spreads its state over the ranks, where it cannot be sliced; use the {type(local).__name__} in "
            "it as it is."
        )
