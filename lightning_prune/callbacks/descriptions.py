"""Descriptions of inputs as plain values, so that a run that is resumed need not look at a batch again."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["described", "like"]

_PLAIN = (bool, int, float, str, type(None))


def described(inputs: Any) -> Any:
    """Return what tells what inputs are like; None of what is not made of tensors and plain values.

    Args:
        inputs: Nested inputs.

    Example:
        >>> described(torch.zeros(1, 3))
        {'shape': [1, 3], 'dtype': 'float32'}
        >>> described(({"x": torch.zeros(2)}, [1]))
        {'tuple': [{'dict': [['x', {'shape': [2], 'dtype': 'float32'}]]}, {'list': [{'value': 1}]}]}
    """
    try:
        return _described(inputs)
    except TypeError:
        return None


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "dtype": dtype}
    if type(value) in _PLAIN:
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[name, _described(item)] for name, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is not described.")


def like(description: dict[str, Any]) -> Any:
    """Return inputs like those that were described, of zeros.

    Args:
        description: What `described` returned.

    Example:
        >>> like({"tuple": [{"shape": [1, 2], "dtype": "int64"}, {"value": "a name"}]})
        (tensor([[0, 0]]), 'a name')
    """
    if "shape" in description:
        return torch.zeros(description["shape"], dtype=getattr(torch, description["dtype"]))
    if "value" in description:
        return description["value"]
    if "dict" in description:
        return {name: like(item) for name, item in description["dict"]}
    if "tuple" in description:
        return tuple(like(item) for item in description["tuple"])
    return [like(item) for item in description["list"]]
