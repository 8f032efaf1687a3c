"""Memory of a pass: what its modules returned, to be returned again where the network is run in another way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lightning_prune.graph.records import ModuleCall, Record

__all__ = ["Memory", "copied", "what_is_kept"]

_CONTAINERS = (list, dict, set)
_PLAIN = (bool, int, float, str, type(None))


class Memory:
    """The calls of a pass on tensors without data whose outputs tell all that the modules do.

    Args:
        record: What the pass showed.
        like: What another pass showed; calls that return something else there are not remembered.
    """

    def __init__(self, record: Record, like: Record | None = None) -> None:
        self._calls: dict[str, list[ModuleCall]] = {}
        others = record if like is None else like
        for key, call in record.module_calls.items():
            other = others.module_calls.get(key)
            if other is None or _has_labels(call.inputs):
                continue
            if _agree(call.output, other.output, _are_outputs_alike):
                calls = self._calls.setdefault(key.module, [])
                calls.append(call)

    def recall(self, module: str, inputs: Any) -> ModuleCall | None:
        """Return a call of a module that was given the like, if there was one.

        Args:
            module: Name of the module.
            inputs: The positional and the named arguments.
        """
        calls = self._calls.get(module)
        if not calls or _has_labels(inputs):
            return None
        for call in calls:
            if _agree(call.inputs, inputs, _are_inputs_alike):
                return call
        return None


def copied(output: Any) -> Any:
    """Return an output on tensors of its own, with the same labels."""
    return tree_map(_copied_leaf, output)


def _copied_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    attributes = vars(made)
    attributes.update(vars(leaf))
    return made


def _has_labels(value: Any) -> bool:
    leaves = tree_leaves(value)
    return any(getattr(leaf, "_channel_labels", None) for leaf in leaves)


def _agree(one: Any, other: Any, are_alike: Callable[[Any, Any], bool]) -> bool:
    """Tell whether nested values have the same structure, and at each place what is alike."""
    leaves, structure = tree_flatten(one)
    other_leaves, other_structure = tree_flatten(other)
    if structure != other_structure:
        return False
    pairs = zip(leaves, other_leaves, strict=True)
    return all(are_alike(first, second) for first, second in pairs)


def _are_inputs_alike(one: Any, other: Any) -> bool:
    """Tell whether two inputs are tensors of the same shape, or otherwise the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.dtype == other.dtype and one.is_meta == other.is_meta
        return same_kind and one.shape == other.shape
    if one is other:
        return True
    is_plain = type(one) in _PLAIN and type(one) is type(other)
    return is_plain and bool(one == other)


def _are_outputs_alike(one: Any, other: Any) -> bool:
    """Tell whether two outputs are tensors without data of as many axes, or plain values of the same kind."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        without_data = one.is_meta and other.is_meta
        return without_data and one.dim() == other.dim()
    return type(one) is type(other) and type(one) in _PLAIN


def what_is_kept(model: nn.Module) -> list[tuple[str, int, int]] | None:
    """Return what a pass would change if its modules kept anything; None where hooks may keep it elsewhere.

    Args:
        model: A model that may run.
    """
    kept = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        for name, value in vars(module).items():
            length = len(value) if isinstance(value, _CONTAINERS) else 0
            kept.append((name, id(value), length))
    return kept
