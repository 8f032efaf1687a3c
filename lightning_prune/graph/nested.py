"""Nested values: the tensors in whatever a module takes or returns."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["first_length", "nested_tensors", "plain", "plainly", "with_tensors"]


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors in nested values, also in dataclasses and other objects that PyTorch does not look into.

    Args:
        value: Any value; one that refers to itself is collected once.

    Example:
        >>> import torch
        >>> outputs = {"logits": torch.zeros(2), "states": [(torch.ones(1), "a name")]}
        >>> list(nested_tensors(outputs))
        [tensor([0., 0.]), tensor([1.])]
    """
    yield from _tensors_in(value, set())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    for item in _content(value):
        yield from _tensors_in(item, seen)


def _content(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list | set | frozenset):
        return list(value)
    slots = _slot_names(type(value))
    in_slots = [getattr(value, name) for name in slots if hasattr(value, name)]
    in_dictionary = getattr(value, "__dict__", {}).values()
    return [*in_slots, *in_dictionary]


def _slot_names(kind: type) -> Iterator[str]:
    """Return the names of the slots of a class and of the classes it inherits from."""
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name != "__dict__":
                yield name


def first_length(value: Any) -> int | None:
    """Return the length of the first tensor in nested values that has axes: the number of samples in a batch.

    Args:
        value: Any value.

    Example:
        >>> import torch
        >>> first_length([torch.tensor(1.0), {"x": torch.zeros(3, 2)}])
        3
    """
    for tensor in nested_tensors(value):
        if tensor.dim() > 0:
            return len(tensor)
    return None


def with_tensors(value: Any, stand_in: Callable[[Tensor], Tensor]) -> Any:
    """Return nested values with other tensors; objects that PyTorch does not look into are copied.

    Args:
        value: Any value.
        stand_in: What is to be in place of a tensor.

    Example:
        >>> import torch
        >>> with_tensors(({"x": torch.ones(2)}, "a name"), torch.zeros_like)
        ({'x': tensor([0., 0.])}, 'a name')
    """
    made = {}
    for tensor in nested_tensors(value):
        made[id(tensor)] = stand_in(tensor)
    leaves = tree_leaves(value)
    if not made.keys() <= set(map(id, leaves)):
        try:
            return copy.deepcopy(value, dict(made))
        except Exception:  # something in it cannot be copied: then what PyTorch does not look into is shared
            pass

    def replaced(leaf: Any) -> Any:
        return made.get(id(leaf), leaf)

    return tree_map(replaced, value)


def plainly(value: Any) -> Any:
    """Return nested values whose tensors are plain ones; the values themselves if they are already.

    Args:
        value: Any value.
    """
    tensors = nested_tensors(value)
    if all(plain(tensor) is tensor for tensor in tensors):
        return value
    return with_tensors(value, plain)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor without what a subclass knows of it, such as where a picture was taken.

    Operators that run on such a subclass return new ones of it, of which nobody knows what they were made of. One that
    has operators of its own stays what it is.

    Args:
        tensor: The tensor.
    """
    kind = type(tensor)
    has_operators = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if kind in (Tensor, nn.Parameter) or has_operators:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)
