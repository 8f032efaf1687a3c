"""Descriptions of inputs as plain values, so that a run that is resumed need not look at a batch again."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["described", "like"]

_PLAIN = (bool, int, float, str, type(None))
_FEW = 1024  # values that are kept, where zeros in their place may be refused
_MOST_AXES = 2  # of what may hold lengths, boxes or labels, which mean something


def described(inputs: Any) -> Any:
    """Return what tells what inputs are like; None of what is not made of tensors and plain values.

    Args:
        inputs: Nested inputs.

    Example:
        >>> described(torch.zeros(1, 3, 224, 224))
        {'shape': [1, 3, 224, 224], 'dtype': 'float32'}
        >>> described(({"length": torch.tensor([5])}, [1]))
        {'tuple': [{'dict': [['length', {'shape': [1], 'dtype': 'int64', 'values': [5]}]]}, {'list': [{'value': 1}]}]}
    """
    try:
        return _described(inputs)
    except TypeError:
        return None


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        description = {"shape": list(value.shape), "dtype": dtype}
        is_small = 0 < value.numel() <= _FEW and value.dim() <= _MOST_AXES
        if is_small and not value.is_complex():
            description["values"] = value.flatten().tolist()
        return description
    if type(value) in _PLAIN:
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[name, _described(item)] for name, item in value.items()]}
    raise TypeError(f"{type(value).__name__} is not described.")


def like(description: dict[str, Any]) -> Any:
    """Return inputs like those that were described: small tensors as they were, and zeros for others.

    Args:
        description: What `described` returned.

    Example:
        >>> like({"tuple": [{"shape": [1, 2], "dtype": "int64"}, {"value": "a name"}]})
        (tensor([[0, 0]]), 'a name')
    """
    if "shape" in description:
        return _tensor(**description)
    if "value" in description:
        return description["value"]
    if "dict" in description:
        return {name: like(item) for name, item in description["dict"]}
    if "tuple" in description:
        return tuple(like(item) for item in description["tuple"])
    return [like(item) for item in description["list"]]


def _tensor(shape: list[int], dtype: str, values: list[Any] | None = None) -> Tensor:
    if values is None:
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(shape)
