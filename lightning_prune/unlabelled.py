"""Batches as they are trained on, and what a model is called with out of them: labels are left out."""

import inspect
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import nn

__all__ = ["arguments_of_forward", "first_entry", "forward_arguments", "run_forward"]

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def run_forward(model: nn.Module, batch: Any, arguments: int = 1) -> Any:
    """Run a model on what its ``forward`` takes from a batch; labels are left out.

    Args:
        model: The model.
        batch: As for `forward_arguments`.
        arguments: How many entries of a list or tuple are taken.
    """
    args, kwargs = forward_arguments(model, batch, arguments)
    return model(*args, **kwargs)


def forward_arguments(model: nn.Module, batch: Any, arguments: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with: positional arguments and named ones.

    Args:
        model: The model.
        batch: A tensor; a list or tuple, of which the first entries are taken; or a dictionary, of which ``forward``
            is given the entries that it has a name for, or all as one argument if it has a name for none.
        arguments: How many entries of a list or tuple are taken.

    Example:
        >>> forward_arguments(nn.Linear(2, 1), ["images", "labels"])
        (('images',), {})
        >>> forward_arguments(nn.Linear(2, 1), {"input": "images", "label": "labels"})
        ((), {'input': 'images'})
    """
    if isinstance(batch, list | tuple) and batch:
        if arguments > 1 and len(batch) >= arguments:
            return tuple(batch[:arguments]), {}
        return forward_arguments(model, batch[0], arguments)
    if isinstance(batch, Mapping):
        named = {name: batch[name] for name in inspect.signature(model.forward).parameters if name in batch}
        if named:
            return (), named
    return (batch,), {}


def arguments_of_forward(model: nn.Module) -> int:
    """Return how many positional arguments ``forward`` cannot do without, at least one.

    Example:
        >>> arguments_of_forward(nn.Bilinear(2, 2, 1))
        2
    """
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [one for one in parameters if one.kind in _POSITIONAL and one.default is Parameter.empty]
    return max(1, len(needed))


def first_entry(batch: Any) -> Any:
    """Return the first entry of a batch as it is, such as a list of images.

    Raises:
        TypeError: If the batch is no list or tuple: the first row of a tensor is no entry.

    Example:
        >>> first_entry(([1, 2], ["labels"]))
        [1, 2]
    """
    if not isinstance(batch, list | tuple):
        raise TypeError(f"a batch of type {type(batch).__name__} has no entries")
    return batch[0]
