"""Memory of a pass: what its modules returned, to be returned again where the network is run in another way."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lightning_prune.graph.records import ModuleCall, Record

__all__ = ["Memory", "copied", "what_is_kept"]

_CONTAINERS = (list, dict, set)


class Memory:
    """The calls of a pass on tensors without data whose outputs tell all that the modules do.

    Args:
        record: What the pass showed.
        like: What another pass showed; calls that return something else there are not remembered.
    """

    def __init__(self, record: Record, like: Record | None = None) -> None:
        self._calls: dict[str, list[ModuleCall]] = {}
        for key, call in record.module_calls.items():
            other = like.module_calls.get(key) if like is not None else call
            if other is not None and _is_alike(call.output, other.output) and not _has_labels(call.inputs):
                self._calls.setdefault(key.module, []).append(call)

    def recall(self, module: str, inputs: Any) -> ModuleCall | None:
        """Return a call of a module that was given the like, if there was one.

        Args:
            module: Name of the module.
            inputs: The positional and the named arguments.
        """
        calls = self._calls.get(module, ())
        if not calls or _has_labels(inputs):
            return None
        for call in calls:
            if _is_given_alike(call.inputs, inputs):
                return call
        return None


def copied(output: Any) -> Any:
    """Return an output on tensors of its own, with the same labels."""
    return tree_map(_copied_leaf, output)


def _copied_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    vars(made).update(vars(leaf))
    return made


def _has_labels(value: Any) -> bool:
    return any(getattr(leaf, "_channel_labels", None) for leaf in tree_leaves(value))


def _is_given_alike(expected: Any, found: Any) -> bool:
    """Tell whether two calls are given tensors of the same shapes, and otherwise the same."""
    expected_leaves, structure = tree_flatten(expected)
    leaves, other_structure = tree_flatten(found)
    if structure != other_structure:
        return False
    pairs = zip(expected_leaves, leaves, strict=True)
    return all(_is_same_leaf(one, other) for one, other in pairs)


def _is_same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.shape, one.dtype, one.is_meta) == (other.shape, other.dtype, other.is_meta)
    plain = isinstance(one, bool | int | float | str | None) and type(one) is type(other)
    return one is other or (plain and one == other)


def _is_alike(expected: Any, found: Any) -> bool:
    """Tell whether two outputs hold tensors without data of as many axes, at the same places."""
    expected_leaves, structure = tree_flatten(expected)
    leaves, other_structure = tree_flatten(found)
    if structure != other_structure:
        return False
    return all(_is_like(one, other) for one, other in zip(expected_leaves, leaves, strict=True))


def _is_like(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.is_meta and other.is_meta and one.dim() == other.dim()
    return not isinstance(one, Tensor) and type(one) is type(other) and isinstance(one, int | float | str | None)


def what_is_kept(model: nn.Module) -> list[tuple[str, int, int]] | None:
    """Return what a pass would change if its modules kept anything; None where hooks may keep it elsewhere.

    Args:
        model: A model that may run.
    """
    kept = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        kept += list(_of_attributes(module))
    return kept


def _of_attributes(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    for name, value in vars(module).items():
        yield name, id(value), len(value) if isinstance(value, _CONTAINERS) else 0
