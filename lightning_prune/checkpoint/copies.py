"""Copies of the weights of a model where torch does not look for them, found by equal names and shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.pruning import Follower

__all__ = ["Match", "attributes_of", "copies_in", "hidden_copies", "items_of", "outermost", "own_of", "sources_of"]

_DEPTH = 3  # of the objects in which copies are looked for
_NOT_SEARCHED = (Tensor, Dataset, DataLoader, torch.optim.Optimizer, type)
_HIDDEN = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")

Sources = Mapping[str, dict[str, Tensor]]  # the tensors of each submodule by name


@dataclass(frozen=True)
class Match:
    """A copy of weights.

    Attributes:
        kept: The module, or the dictionary or list of tensors.
        source: Dotted name of the submodule that it is a copy of.
        follower: Its tensors, by the names of those that they are copies of.
    """

    kept: Any
    source: str
    follower: Follower


def sources_of(model: nn.Module) -> Sources:
    """Return what there may be copies of: the tensors of each submodule.

    Args:
        model: The model.
    """
    return {name: named_tensors(module) for name, module in model.named_modules()}


def attributes_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a model and its submodules, but for what torch keeps in them, by dotted name.

    Args:
        model: The model.
    """
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _HIDDEN:
                yield f"{prefix}.{name}".lstrip("."), value


def hidden_copies(model: nn.Module) -> Iterator[tuple[str, Match]]:
    """Yield the copies of weights that a model keeps where torch does not look, each with the name of its attribute.

    Args:
        model: The model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> model.average = [nn.Linear(2, 3)]
        >>> [(name, found.source) for name, found in hidden_copies(model)]
        [('average', '0')]
    """
    sources, own = sources_of(model), own_of(model)
    for name, value in attributes_of(model):
        for copy in copies_in(value, own):
            match = outermost(copy, sources)
            if match is not None:
                yield name, match


def own_of(model: nn.Module) -> set[int]:
    """Return the identities of the modules and tensors of a model, which are no copies.

    Args:
        model: The model.
    """
    own = {id(module) for module in model.modules()}
    return own | {id(tensor) for tensor in named_tensors(model).values()}


def outermost(copy: Any, sources: Sources) -> Match | None:
    """Return the outermost part of what may be a copy that is one, as averages are wrapped.

    Args:
        copy: A module, or a dictionary or list of tensors.
        sources: What it may be a copy of.
    """
    for part in copy.modules() if isinstance(copy, nn.Module) else [copy]:
        match = _match(part, sources)
        if match is not None:
            module = part if isinstance(part, nn.Module) else None
            source, tensors = match
            return Match(part, source, Follower(tensors, module))
    return None


def copies_in(value: Any, own: set[int], depth: int = _DEPTH) -> Iterator[Any]:
    """Yield the modules, the dictionaries of tensors and the lists of tensors in a value that are not the model's.

    Args:
        value: The value.
        own: The identities of what is the model's.
        depth: How deep objects are searched.
    """
    if id(value) in own or _is_not_searched(value) or depth == 0:
        return
    if isinstance(value, nn.Module):
        yield value
        return
    items = items_of(value)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) > 1 and not any(id(tensor) in own for tensor in tensors):
        yield value
    for item in items:
        yield from copies_in(item, own, depth - 1)


def _is_not_searched(value: Any) -> bool:
    # A Trainer, of either package, leads everywhere.
    return isinstance(value, _NOT_SEARCHED) or any(kind.__name__ == "Trainer" for kind in type(value).__mro__)


def items_of(value: Any) -> list[Any]:
    """Return what a collection or an object holds.

    Args:
        value: The collection or object.
    """
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())


def _match(copy: Any, sources: Sources) -> tuple[str, dict[str, Tensor]] | None:
    """Return the submodule that has the names and shapes of a copy, and its tensors by the names of that one's."""
    for name, tensors in sources.items():
        for named in _as_named(copy, tensors):
            if len(named) > 1 and all(_fits(tensor, tensors.get(key)) for key, tensor in named.items()):
                prefix = f"{name}." if name else ""
                return name, {f"{prefix}{key}": tensor for key, tensor in named.items()}
    return None


def _fits(tensor: Tensor, source: Tensor | None) -> bool:
    return source is not None and source.shape == tensor.shape


def _as_named(copy: Any, source: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a copy by names: a list is in the order of the parameters, of all or of those trained."""
    if isinstance(copy, nn.Module):
        tensors = named_tensors(copy)
        if tensors.keys() == source.keys():
            yield tensors
    elif isinstance(copy, Mapping):
        named = {key: value for key, value in copy.items() if isinstance(value, Tensor)}
        yield named
    elif isinstance(copy, list | tuple):
        parameters = [key for key, tensor in source.items() if isinstance(tensor, nn.Parameter)]
        trained = [key for key in parameters if source[key].requires_grad]
        for keys in (parameters, trained):
            if len(keys) == len(copy) and all(isinstance(item, Tensor) for item in copy):
                yield dict(zip(keys, copy, strict=True))
