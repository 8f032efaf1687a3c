"""Substitution: running a model on other tensors than its own, and finding the tensors that it has."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.sizes import sync_attributes

__all__ = ["named_tensors", "owning_modules", "preserving_attributes", "replace_tensors", "substituting_tensors"]

Forward = Callable[..., Any]
ForwardWrapper = Callable[[nn.Module, Forward], Forward]

_COLLECTIONS = frozenset({dict, OrderedDict, defaultdict, list, deque, set})
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


# -- finding tensors ---------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and then every buffer of a model, by its dotted name.

    A tensor that is shared is there once, under its first name.

    Args:
        model: The model.

    Example:
        >>> list(named_tensors(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))))
        ['0.weight', '0.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in _prefixed_modules(model):  # walked once for both, which is most of the time this takes
        _add_unseen(module._parameters, prefix, seen, parameters)
        _add_unseen(module._buffers, prefix, seen, buffers)
    return {**parameters, **buffers}


def _add_unseen(tensors: Mapping[str, Tensor | None], prefix: str, seen: set[int], named: dict[str, Tensor]) -> None:
    """Add the tensors of one module, with its prefix before their names, except for those whose ``id`` was seen."""
    for name, tensor in tensors.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            named[prefix + name] = tensor


def owning_modules(model: nn.Module, tensors: Iterable[Tensor]) -> list[nn.Module]:
    """Return the submodules that have any of some parameters and buffers as their own.

    Args:
        model: The model.
        tensors: Parameters and buffers of it; a shared one is owned by several submodules.
    """
    wanted = {id(tensor) for tensor in tensors}
    owning = []
    for _, module in _prefixed_modules(model):
        own_tensors = (*module._parameters.values(), *module._buffers.values())
        if any(id(tensor) in wanted for tensor in own_tensors):
            owning.append(module)
    return owning


def _prefixed_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what comes before the names of each submodule's tensors, and the submodule, as ``named_modules`` does.

    Pruning in many small steps walks the model at each of them; PyTorch's nested generators take several times longer.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found.append((prefix, module))
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


# -- substituting tensors ----------------------------------------------------------------------------------------------


def replace_tensors(module: nn.Module, stand_ins: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers of one module, and bring its size attributes in step; not those of its children.

    Args:
        module: The module.
        stand_ins: What replaces each tensor, by the ``id`` of the tensor; tensors that are absent are not replaced.

    Example:
        >>> linear = nn.Linear(3, 4, bias=False)
        >>> replace_tensors(linear, {id(linear.weight): nn.Parameter(torch.zeros(2, 3))})
        >>> linear
        Linear(in_features=3, out_features=2, bias=False)
    """
    shapes_changed = False
    own_tensors: list[Any] = [module._parameters, module._buffers]
    for tensors_by_name in own_tensors:
        for name, tensor in tensors_by_name.items():
            stand_in = stand_ins.get(id(tensor))
            if stand_in is not None:
                tensors_by_name[name] = stand_in
                shapes_changed = shapes_changed or stand_in.shape != tensor.shape
    if shapes_changed:
        sync_attributes(module)


@contextmanager
def substituting_tensors(
    model: nn.Module, stand_ins: Mapping[int, Tensor], training: bool, wrap_forward: ForwardWrapper
) -> Iterator[None]:
    """Replace tensors of a model for a while, and restore every attribute of every submodule afterwards.

    Unlike ``torch.func.functional_call`` this also restores what a forward pass writes to the modules (counters,
    caches, the plain ``weight`` that old-style weight norm sets) and keeps size attributes in step with the tensors.

    Args:
        model: The model to run.
        stand_ins: What replaces each parameter and buffer, by the ``id`` of the tensor.
        training: The mode to run in; set without calling anyone's ``train`` method, which may have side effects.
        wrap_forward: Given a submodule and its forward function, returns the function to run in its place.
    """
    with preserving_attributes(model):
        for module in model.modules():
            replace_tensors(module, stand_ins)
            attributes = vars(module)
            attributes["training"] = training
            if not isinstance(module, torch.jit.ScriptModule):
                attributes["forward"] = wrap_forward(module, module.forward)
        yield


# -- preserving attributes ---------------------------------------------------------------------------------------------


@contextmanager
def preserving_attributes(model: nn.Module) -> Iterator[None]:
    """Restore every attribute of every submodule afterwards, also what a forward pass changes in place.

    Counters, caches and the states of metrics are tensors that are no parameters or buffers, and collections. Until
    then such tensors are copies. Collections are not replaced, because hooks may refer to them; they get their content
    back.

    Args:
        model: The model. Values of its parameters and buffers that change in place are not restored; give it others
            by `replace_tensors` to keep them.
    """
    modules = list(model.modules())
    attributes = [module.__dict__ for module in modules]
    collections = list(_plain_collections(attributes))
    # A copy of `__dict__` only refers to the dictionaries of parameters, buffers and children.
    by_name = [*attributes]
    for module in modules:
        by_name += [module._parameters, module._buffers, module._modules]
    saved = [(named, dict(named)) for named in by_name]
    saved += [(collection, copy.copy(collection)) for collection in collections]
    try:
        _copy_tensors([*attributes, *collections])
        yield
    finally:
        for collection, content in saved:
            _refill(collection, content)


def _plain_collections(attributes: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Find the collections among the attributes of modules, and those in them, but not what PyTorch keeps itself."""
    seen: set[int] = set()
    unsearched = []
    for by_name in attributes:
        unsearched += [value for name, value in by_name.items() if name not in _TORCH_ATTRIBUTES]
    while unsearched:
        value = unsearched.pop()
        if type(value) in _COLLECTIONS and id(value) not in seen:
            seen.add(id(value))
            unsearched.extend(value.values() if isinstance(value, dict) else value)
            yield value


def _copy_tensors(collections: Iterable[Any]) -> None:
    """Replace the tensors in collections by copies, one that is there several times by the same copy."""
    copies: dict[int, Tensor] = {}
    for collection in collections:
        if isinstance(collection, set):  # its tensors are found by their identity
            continue
        items = collection.items() if isinstance(collection, dict) else enumerate(collection)
        for key, value in items:
            # In this order: asking whether something is a parameter takes longer, and few attributes are tensors.
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                continue
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone()
            collection[key] = copies[id(value)]


def _refill(collection: Any, content: Any) -> None:
    if isinstance(collection, list | deque):
        collection.clear()
        collection.extend(content)
    elif isinstance(collection, dict | set):
        collection.clear()
        collection.update(content)
    else:  # the tensors of a scripted module, whose names are fixed
        for name, value in content.items():
            collection[name] = value
