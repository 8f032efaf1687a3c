"""Substitution: running a model on other tensors than its own, and finding the tensors that it has."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.sizes import sync_attributes

__all__ = ["given_back", "named_tensors", "owners", "put", "substituted"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of ``model`` by its dotted name, shared ones once, under their first name."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in _walk(model, "", set()):  # walked once for both, which is most of the time this takes
        for named, held in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    named[prefix + name] = tensor
    return {**parameters, **buffers}


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> list[tuple[str, nn.Module]]:
    """Return the module and all below it in the order of ``named_modules``, each with what comes before its names.

    Pruning in many small steps walks the model at each of them; PyTorch's nested generators take several times longer.
    """
    if id(module) in seen:
        return []
    seen.add(id(module))
    found = [(prefix, module)]
    for name, child in module._modules.items():
        if child is not None:
            found += _walk(child, f"{prefix}{name}.", seen)
    return found


def put(module: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    """Give a module, and not its children, other tensors in the place of its own, and size attributes that fit them.

    Args:
        module: The module.
        tensors: The stand-in of each parameter and buffer, by ``id`` of the tensor it stands in for.
    """
    changed = False
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            stand_in = tensors.get(id(tensor))
            if stand_in is not None:
                held[name] = stand_in  # type: ignore[assignment]
                changed = changed or stand_in.shape != tensor.shape  # type: ignore[union-attr]
    if changed:
        sync_attributes(module)


@contextmanager
def substituted(
    model: nn.Module,
    tensors: Mapping[int, Tensor],
    training: bool,
    watched: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Run ``model`` on other tensors for a while, and give back every attribute of every module afterwards.

    Unlike ``torch.func.functional_call`` this also restores what a forward pass writes to the modules (counters,
    caches, the plain ``weight`` that old-style weight norm sets) and keeps size attributes in step with the tensors.

    Args:
        model: The module to run.
        tensors: The stand-in of each parameter and buffer, by ``id`` of the tensor it stands in for.
        training: The mode to run in; set without calling anyone's ``train`` method, which may have side effects.
        watched: Given a module and its forward function, returns the function to run in its place.
    """
    with given_back(model):
        for m in model.modules():
            put(m, tensors)
            m.__dict__["training"] = training
            if not isinstance(m, torch.jit.ScriptModule):
                m.__dict__["forward"] = watched(m, m.forward)
        yield


_COLLECTIONS = frozenset({dict, OrderedDict, defaultdict, list, deque, set})
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Give back every attribute of every module afterwards, also what a forward pass changes in place.

    Counters, caches and the states of metrics are tensors that are no parameters or buffers, and collections. Until
    then such tensors are copies; collections stay the objects that hooks may refer to, and get their content back.

    Args:
        model: The model. Values of its parameters and buffers that change in place stay changed; see `put`.
    """
    modules = list(model.modules())
    attributes = [m.__dict__ for m in modules]
    # The dictionaries of parameters, buffers and children are objects of their own, which a copy of `__dict__` only
    # refers to.
    held = [each for m in modules for each in (m._parameters, m._buffers, m._modules)]
    plain = list(_plain_collections(attributes))
    saved = [(each, dict(each)) for each in (*attributes, *held)] + [(each, copy.copy(each)) for each in plain]
    try:
        _copy_tensors([*attributes, *plain])
        yield
    finally:
        for each, content in saved:
            _refill(each, content)


def _plain_collections(attributes: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Find the collections among the attributes of modules, and those in them, but not what PyTorch keeps itself."""
    seen: set[int] = set()
    found = [
        value
        for each in attributes
        for name, value in each.items()
        if type(value) in _COLLECTIONS and name not in _TORCH_ATTRIBUTES
    ]
    while found:
        value = found.pop()
        if type(value) in _COLLECTIONS and id(value) not in seen:
            seen.add(id(value))
            found.extend(value.values() if isinstance(value, dict) else value)
            yield value


def _copy_tensors(collections: Iterable[Any]) -> None:
    """Replace the tensors in collections by copies, one that is there several times by the same copy."""
    copies: dict[int, Tensor] = {}
    for each in collections:
        for key, value in each.items() if isinstance(each, dict) else enumerate(each):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not isinstance(each, set):
                if id(value) not in copies:
                    copies[id(value)] = value.detach().clone()
                each[key] = copies[id(value)]


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


def owners(model: nn.Module, tensors: Iterable[Tensor]) -> list[nn.Module]:
    """Return the modules that hold any of some parameters and buffers."""
    wanted = {id(tensor) for tensor in tensors}
    return [
        module
        for _, module in _walk(model, "", set())
        if any(id(tensor) in wanted for held in (module._parameters, module._buffers) for tensor in held.values())
    ]
