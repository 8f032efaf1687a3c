"""Substitution: finding the tensors that a model has, and giving its modules others."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.sizes import has_registered_sizes, sync_attributes

__all__ = ["modules_in_step", "named_submodules", "named_tensors", "replace_tensors", "submodules"]


# -- finding tensors ---------------------------------------------------------------------------------------------------


def submodules(model: nn.Module) -> list[nn.Module]:
    """Return a model and all of its submodules, each once, in the order of ``modules``.

    Args:
        model: The model.

    Example:
        >>> submodules(nn.Sequential(nn.ReLU(), nn.Sigmoid()))[1:]
        [ReLU(), Sigmoid()]
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        if module._modules:
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def named_submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model, by an empty name, and all of its submodules, as ``named_modules`` does.

    Args:
        model: The model.

    Example:
        >>> named_submodules(nn.Sequential(nn.Sequential(nn.ReLU())))["0.0"]
        ReLU()
    """
    return {prefix[:-1]: module for prefix, module in _prefixed_modules(model)}


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


def modules_in_step(model: nn.Module, tensors: Iterable[Tensor]) -> list[nn.Module]:
    """Return the submodules whose size attributes follow some parameters and buffers, innermost first.

    These are the submodules that own any of them, and all that users have said the size attributes of: these may write
    down the sizes of what is in them.

    Args:
        model: The model.
        tensors: Parameters and buffers of it; a shared one is owned by several submodules.
    """
    wanted = {id(tensor) for tensor in tensors}
    following = []
    for _, module in _prefixed_modules(model):
        own_tensors = (*module._parameters.values(), *module._buffers.values())
        if any(id(tensor) in wanted for tensor in own_tensors) or has_registered_sizes(module):
            following.append(module)
    return following[::-1]


def _prefixed_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what comes before the names of each submodule's tensors, and the submodule, as ``named_modules`` does.

    Pruning in many small steps walks the model at each of them; PyTorch's nested generators take several times longer.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((prefix, module))
        if module._modules:
            children = reversed(module._modules.items())
            waiting += [(f"{prefix}{name}.", child) for name, child in children if child is not None]
    return found


# -- substituting tensors ----------------------------------------------------------------------------------------------


def replace_tensors(module: nn.Module, stand_ins: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers of one module, and bring its size attributes in step; not those of its children.

    Args:
        module: The module.
        stand_ins: What replaces each tensor, by the ``id`` of the tensor; tensors that are absent are not replaced.

    Example:
        >>> import torch
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
