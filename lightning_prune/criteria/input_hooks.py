"""Hooks on the inputs of the layers that consume channel groups."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.compiled import forget_compiled, in_use
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["OnInput", "check_watchable", "sum_positions", "unwatch", "watch_inputs"]

OnInput = Callable[[str, Tensor, int], Tensor | None]
"""Given the name of a weight, what its layer is given and the axis of the channels; may return another input."""


def watch_inputs(graph: ChannelGraph, on_input: OnInput) -> list[RemovableHandle]:
    """Show what is consumed of the channel groups, each time before it is consumed.

    Args:
        graph: The traced model.
        on_input: What is called; it may return a tensor to be consumed instead.

    Returns:
        Handles for `unwatch`.
    """
    forget_compiled()
    # What is done with a gradient depends on when it comes, which compiled code would not ask.
    on_input = _NotCompiled(on_input)
    modules = dict(graph.model.named_modules())
    slices = [place for group in graph.groups.values() for place in group.in_slices]
    handles = []
    for weight in dict.fromkeys(place.tensor for place in slices):
        layer = modules[_module_of(weight)]
        handles.append(layer.register_forward_pre_hook(partial(_show_input, on_input, weight)))
    return handles


def unwatch(handles: Iterable[RemovableHandle]) -> None:
    """Stop showing what is consumed."""
    for handle in handles:
        handle.remove()
    forget_compiled()


class _NotCompiled:
    """Call a function as it is from compiled code too; unlike what `torch.compiler.disable` returns, this is copied."""

    def __init__(self, function: OnInput) -> None:
        self.function = function
        self.call = torch.compiler.disable(function) if in_use() else function

    def __reduce__(self) -> tuple[type["_NotCompiled"], tuple[OnInput]]:
        return _NotCompiled, (self.function,)

    def __call__(self, weight: str, values: Tensor, axis: int) -> Tensor | None:
        return self.call(weight, values, axis)


def _show_input(on_input: OnInput, weight: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    values, *others = args
    axis = values.dim() - 1 if isinstance(layer, nn.Linear) else 1
    instead = on_input(weight, values, axis)
    return None if instead is None else (instead, *others)


def check_watchable(graph: ChannelGraph, criterion: str) -> None:
    """Raise a ValueError where channels are consumed by others than convolutions and linear layers.

    Args:
        graph: The traced model.
        criterion: What needs to watch, in words.
    """
    modules = dict(graph.model.named_modules())
    for name, group in graph.groups.items():
        for place in group.in_slices:
            path = _module_of(place.tensor)
            module = modules[path]
            is_weight = place.tensor.rpartition(".")[2] == "weight"
            if not is_weight or not isinstance(module, nn.Linear | _ConvNd):
                raise ValueError(
                    f"{criterion} cannot watch what {path or 'the model'!r} ({type(module).__name__}) consumes of "
                    f"group {name!r}; add {name!r} to ignore, or use a criterion that needs no activations, such as "
                    "'l1', or 'taylor' with variant 'gate'."
                )


def sum_positions(values: Tensor, axis: int) -> Tensor:
    """Sum over all axes but the first and that of the channels, in single precision at least.

    Args:
        values: (n, ...) one value per number that a layer consumes.
        axis: The axis of the channels.

    Returns:
        (n, channels).

    Example:
        >>> sum_positions(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), axis=2)
        tensor([[4., 6.]])
    """
    dtype = torch.promote_types(values.dtype, torch.float32)  # sums of half precision lack the small terms
    values = values.movedim(axis, 1)  # (n, channels, ...)
    if values.dim() == 2:
        return values.to(dtype)
    return values.flatten(2).sum(2, dtype=dtype)


def _module_of(tensor: str) -> str:
    """Return the name of the module that a parameter belongs to."""
    return tensor.rpartition(".")[0]
