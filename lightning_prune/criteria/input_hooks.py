"""Hooks on the inputs of the layers that consume channel groups or, where no layer does, on what produces them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.compiled import forget_compiled, in_use
from lightning_prune.graph.attention import FreeMultiheadAttention
from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.pruning_plan import Slice

__all__ = [
    "ATTENTION",
    "OnInput",
    "check_watchable",
    "consumed_places",
    "places_made",
    "positions_of_channels",
    "sum_positions",
    "unwatch",
    "watch_inputs",
    "watched_places",
]

OnInput = Callable[[str, Tensor, int], Tensor | None]
"""Given the key of a place, the values there and the axis of the channels; may return other values."""

ATTENTION = (nn.MultiheadAttention, FreeMultiheadAttention)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_WEIGHTS = ("weight", "weight_v", "weight_orig")  # and what it is computed from, where that is normalised
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def consumed_places(group: Group) -> dict[str, list[Slice]]:
    """Return where layers consume a group, by the names of their weights.

    Args:
        group: The group.
    """
    places: dict[str, list[Slice]] = {}
    for place in group.consuming:
        of_tensor = places.setdefault(place.tensor, [])
        of_tensor.append(place)
    return places


def watched_places(graph: ChannelGraph, group: Group) -> dict[str, list[Slice]]:
    """Return where a group is watched, by key: in what its layers consume, or else in what produces it.

    A channel may lie in several slices of one tensor, as one of the width of attention heads does in each head.

    Args:
        graph: The traced model.
        group: One of its groups.
    """
    places = consumed_places(group)
    if places:
        return places
    for place in places_made(graph, group):
        key = f"{place.tensor} (output)"
        of_tensor = places.setdefault(key, [])
        of_tensor.append(place)
    return places


def positions_of_channels(graph: ChannelGraph, name: str, places: Sequence[Slice]) -> Tensor:
    """Return where the kept channels of a group lie in some slices of a tensor: (kept channels, positions of each).

    Args:
        graph: The traced model.
        name: Name of the group.
        places: The slices.
    """
    channels = graph.kept(name)
    by_place = []
    for place in places:
        positions = graph.positions_now(place, channels)
        by_channel = positions.view(len(channels), -1)
        by_place.append(by_channel)
    return torch.cat(by_place, 1)


def places_made(graph: ChannelGraph, group: Group) -> list[Slice]:
    """Return where a group is last seen before it is consumed: in normalisation, or else in what produces it.

    Args:
        graph: The traced model.
        group: One of its groups.
    """
    modules = dict(graph.model.named_modules())
    tensors: dict[str, str] = {}  # one of each normalisation, by its name
    normalised = []
    for place in group.other_slices:
        name = _module_of(place.tensor)
        if not isinstance(modules[name], _NORMS):
            continue
        tensor = tensors.setdefault(name, place.tensor)
        if place.tensor == tensor:
            normalised.append(place)
    return normalised or list(group.out_slices)


def watch_inputs(graph: ChannelGraph, on_input: OnInput) -> list[RemovableHandle]:
    """Show what is consumed of the channel groups, each time before it is consumed, or when it is produced.

    What happens inside multi-head attention is shown by `ProjectionWatch` alone.

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
    before: dict[str, nn.Module] = {}
    after: dict[str, nn.Module] = {}
    for group in graph.groups.values():
        hooked = before if group.consuming else after
        for key, places in watched_places(graph, group).items():
            owner, _ = _layer_of(places[0].tensor)
            if not isinstance(modules[owner], nn.MultiheadAttention):
                hooked[key] = modules[owner]
    handles: list[RemovableHandle] = []
    for key, layer in before.items():
        show_input = partial(_show_input, on_input, key)
        handle = layer.register_forward_pre_hook(show_input)
        handles.append(handle)
    for key, layer in after.items():
        show_output = partial(_show_output, on_input, key)
        handle = layer.register_forward_hook(show_output)
        handles.append(handle)
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


def _show_output(on_input: OnInput, key: str, layer: nn.Module, args: Any, output: Any) -> Any:
    axis = 1
    if isinstance(layer, _CHANNELS_LAST):
        axis = output.dim() - 1
    instead = on_input(key, output, axis)
    if instead is None:
        return None
    # Activation functions may work in place, which is not to change what was shown.
    return instead.clone()


def check_watchable(graph: ChannelGraph, criterion: str, projections: Sequence[str] = ()) -> None:
    """Raise a ValueError where channels are consumed, or produced, by others than convolutions and linear layers.

    Args:
        graph: The traced model.
        criterion: What needs to watch, in words.
        projections: The parameters of multi-head attention that are watched too.
    """
    modules = dict(graph.model.named_modules())
    for name, group in graph.groups.items():
        consumed = bool(group.consuming)
        does = "consumes" if consumed else "produces"
        for place, *_ in watched_places(graph, group).values():
            path, parameter = _layer_of(place.tensor)
            module = modules[path]
            is_projection = type(module) in ATTENTION and parameter in projections
            if not is_projection and not _is_watchable(module, parameter, consumed):
                raise ValueError(
                    f"{criterion} cannot watch what {path or 'the model'!r} ({type(module).__name__}) {does} of "
                    f"group {name!r}; add {name!r} to ignore, or use a criterion that needs no activations, such as "
                    "'l1', or 'taylor' with variant 'gate'."
                )


def _is_watchable(module: nn.Module, parameter: str, consumed: bool) -> bool:
    if isinstance(module, nn.Linear | _ConvNd):
        return parameter in _WEIGHTS
    return not consumed and isinstance(module, _NORMS)


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


def _layer_of(tensor: str) -> tuple[str, str]:
    """Return the name of the layer that computes with a parameter, and that of the parameter in it.

    Example:
        >>> _layer_of("head.parametrizations.weight.original1"), _layer_of("head.weight_v")
        (('head', 'weight'), ('head', 'weight_v'))
    """
    owner, _, parameter = tensor.rpartition(".")
    layer, is_parametrized, parametrized = owner.rpartition(".parametrizations.")
    return (layer, parametrized) if is_parametrized else (owner, parameter)
