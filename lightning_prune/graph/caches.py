"""Caches: what a module has kept of its own weights in evaluation mode, which is out of date once they are pruned."""

from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.resized import as_written
from lightning_prune.graph.substitution import submodules

__all__ = ["empty_caches"]

_OF_TORCH = ("_parameters", "_buffers", "_modules")


def empty_caches(model: nn.Module) -> None:
    """Let modules empty what they keep of their weights until they train again, as LeViT does with biases of attention.

    Such modules do that in a ``train`` method of their own. The modes of all their submodules stay as they are.

    Args:
        model: A model whose weights have changed, or a twin of it.
    """
    for module in submodules(model):
        if as_written(type(module)).train is not nn.Module.train and _keeps_tensors(module):
            modes = [(each, each.training) for each in module.modules()]
            module.train()
            for each, mode in modes:
                vars(each)["training"] = mode


def _keeps_tensors(module: nn.Module) -> bool:
    """Tell whether a module has tensors that are neither parameters nor buffers."""
    kept: list[Any] = [value for name, value in vars(module).items() if name not in _OF_TORCH]
    kinds = set(map(type, kept))
    for value in kept:
        if isinstance(value, dict):
            kinds.update(map(type, value.values()))
        elif isinstance(value, list | tuple):  # which may have very many numbers
            kinds.update(map(type, value))
    return any(issubclass(kind, Tensor) for kind in kinds)
