"""Watching what the layers behind channel groups read, and running a model without leaving a trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.compiled import forget_compiled, in_use
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["check_readable", "evaluating", "sum_positions", "unwatch", "watch"]

Read = Callable[[str, Tensor, int], Tensor | None]


def watch(graph: ChannelGraph, read: Read) -> list[RemovableHandle]:
    """Show what is read of the channel groups, each time before it is read.

    Args:
        graph: The traced model.
        read: Given the name of the weight that reads, what it reads and the axis of the channels; may return a tensor
            to be read instead.

    Returns:
        Handles for `unwatch`.
    """
    forget_compiled()
    # What is done with a gradient depends on when it comes, which compiled code would not ask.
    read = _NotCompiled(read)
    modules = dict(graph.model.named_modules())
    tensors = {part.tensor: None for group in graph.groups.values() for part in group.in_slices}
    handles = []
    for tensor in tensors:
        reader = modules[tensor.rpartition(".")[0]]
        handles.append(reader.register_forward_pre_hook(partial(_before, read, tensor)))
    return handles


class _NotCompiled:
    """Call a function as it is from compiled code too; unlike what `torch.compiler.disable` returns, this is copied."""

    def __init__(self, function: Read) -> None:
        self.function = function
        self.call = torch.compiler.disable(function) if in_use() else function

    def __reduce__(self) -> tuple[type["_NotCompiled"], tuple[Read]]:
        return _NotCompiled, (self.function,)

    def __call__(self, tensor: str, values: Tensor, axis: int) -> Tensor | None:
        return self.call(tensor, values, axis)


def unwatch(handles: Iterable[RemovableHandle]) -> None:
    """Stop showing what is read."""
    for handle in handles:
        handle.remove()
    forget_compiled()


def _before(read: Read, tensor: str, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    axis = args[0].dim() - 1 if isinstance(reader, nn.Linear) else 1
    instead = read(tensor, args[0], axis)
    return None if instead is None else (instead, *args[1:])


def check_readable(graph: ChannelGraph, criterion: str) -> None:
    """Raise a ValueError where channels are read by others than convolutions and linear layers.

    Args:
        graph: The traced model.
        criterion: What needs to watch, in words.
    """
    modules = dict(graph.model.named_modules())
    for name, group in graph.groups.items():
        for part in group.in_slices:
            module, _, attribute = part.tensor.rpartition(".")
            kind = modules[module]
            if attribute != "weight" or not isinstance(kind, nn.Linear | nn.modules.conv._ConvNd):
                raise ValueError(
                    f"{criterion} cannot watch what {module or 'the model'!r} ({type(kind).__name__}) reads of "
                    f"group {name!r}; add {name!r} to ignore, or use a criterion that needs no activations, such as "
                    "'l1', or 'taylor' with variant 'gate'."
                )


def sum_positions(values: Tensor, axis: int) -> Tensor:
    """Sum over all axes but the first and that of the channels, in single precision at least.

    Args:
        values: (n, ...) one value per number that a layer reads.
        axis: The axis of the channels.

    Returns:
        (n, channels).

    Example:
        >>> sum_positions(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), axis=2)
        tensor([[4., 6.]])
    """
    values = values.movedim(axis, 1)
    dtype = torch.promote_types(values.dtype, torch.float32)  # sums of half precision lose the small terms
    return values.flatten(2).sum(2, dtype=dtype) if values.dim() > 2 else values.to(dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for a while, so that no statistic moves; then back in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
