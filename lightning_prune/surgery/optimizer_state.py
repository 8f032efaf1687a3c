"""Optimizer state: which of it belongs to the channels of a parameter, and what cannot be told apart."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.surgery.optimizer_contents import larger_tensors, numbers_elsewhere, shape_of, with_inner
from lightning_prune.surgery.replacing import Replacement, of_item
from lightning_prune.surgery.slicing import KeptByAxis, take

__all__ = [
    "REMEDY",
    "check_optimizers",
    "check_places",
    "check_shapes",
    "momentum_to_zero",
    "sliceable",
    "sliced_state",
]

REMEDY = "use another optimizer, such as SGD or AdamW"
_MOMENTA = frozenset({"momentum_buffer", "exp_avg", "grad_avg", "prev"})  # means of gradients, as torch names them


def check_optimizers(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return the optimizers, without wrappers, and those inside them; refuse those whose state cannot be sliced.

    Args:
        optimizers: Optimizers, wrapped by Lightning or not.

    Raises:
        TypeError: If one is no optimizer, or its state cannot be sliced.
    """
    found = with_inner(optimizers)
    for optimizer in found:
        _check_kind(optimizer)
    return found


def check_places(holders: Iterable[Any], known: Iterable[Tensor]) -> None:
    """Raise a TypeError if an optimizer keeps numbers elsewhere than in its state, where nobody finds and slices them.

    Args:
        holders: Optimizers that train what loses channels, and what wraps them.
        known: The parameters and buffers of the model, and all parameters that optimizers train.
    """
    ids = {id(tensor) for tensor in known}
    for holder in holders:
        for place, tensor in numbers_elsewhere(holder, ids):
            raise TypeError(
                f"{type(holder).__name__} keeps numbers of shape {shape_of(tensor)} in {place!r}, outside its state of "
                f"the parameters, where nothing says which of them belong to which channel; {REMEDY}."
            )


def check_shapes(optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Raise a TypeError if the shape of a state does not say which numbers belong to a channel.

    Args:
        optimizers: What `check_optimizers` returned.
        tensors: The tensors that lose channels, by dotted name.
    """
    for optimizer in optimizers:
        for name, tensor in tensors.items():
            for key, value in optimizer.state.get(tensor, {}).items():
                if not _can_be_sliced(value, tensor):
                    what = f"{type(optimizer).__name__} keeps {key!r} of {name!r}"
                    shapes = dict.fromkeys(map(shape_of, larger_tensors(value)))  # each once
                    raise TypeError(
                        f"{what} in shape {' and '.join(shapes)}, where nothing says which numbers belong to which "
                        f"channel; {REMEDY}."
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
        for key, value in sliceable(optimizer, tensor).items():
            yield of_item(optimizer.state[tensor], key, _sliced(value, tensor, kept))


def momentum_to_zero(optimizers: Iterable[Optimizer], tensor: Tensor) -> Iterator[Replacement]:
    """Set momentum, which is about earlier values of a parameter, to zero; second moments and counters are kept.

    Args:
        optimizers: What `check_optimizers` returned.
        tensor: A parameter that has other values now.

    Yields:
        What is to be put in place.
    """
    for optimizer in optimizers:
        for key, value in sliceable(optimizer, tensor).items():
            if key in _MOMENTA:
                zeros = torch.zeros_like(value)
                yield of_item(optimizer.state[tensor], key, zeros)


def sliceable(optimizer: Optimizer, tensor: Tensor) -> dict[Any, Tensor]:
    """Return what an optimizer keeps in the shape of a parameter, by key."""
    state = optimizer.state.get(tensor, {})
    return {key: value for key, value in state.items() if _has_axes_of(value, tensor)}


def _sliced(value: Tensor, tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Slice a state along the axes that it has in full; those of factored states have length 1."""
    full_axes = [axis for axis in kept if value.shape[axis] == tensor.shape[axis]]
    return take(value, {axis: kept[axis] for axis in full_axes})


def _has_axes_of(value: Any, tensor: Tensor) -> bool:
    """Tell whether a state is a tensor with as many axes as a parameter, and is no single number."""
    return isinstance(value, Tensor) and value.numel() > 1 and value.dim() == tensor.dim()


def _can_be_sliced(value: Any, tensor: Tensor) -> bool:
    """Tell whether a state has the shape of a parameter, but for axes of length 1, or nothing to slice."""
    if not larger_tensors(value):
        return True
    if not _has_axes_of(value, tensor):
        return False
    sizes = zip(value.shape, tensor.shape, strict=True)
    return all(size in (1, full_size) for size, full_size in sizes)


def _check_kind(optimizer: Optimizer) -> None:
    """Raise a TypeError if the state of an optimizer cannot be sliced, whatever the parameters."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} keeps its history for all parameters in one vector, which cannot lose channels; {REMEDY}."
        )
    local = getattr(optimizer, "optim", None)  # of a ZeroRedundancyOptimizer
    if isinstance(local, Optimizer) and local.state is not optimizer.state:
        raise TypeError(
            f"{name} spreads its state over the ranks, where it cannot be sliced; use the {type(local).__name__} in "
            "it as it is."
        )
