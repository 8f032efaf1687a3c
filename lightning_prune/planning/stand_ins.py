"""Stand-ins: tensors that give a network the shapes it has at other widths, for as long as it is timed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.compiled import as_written
from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.entry import let_in
from lightning_prune.graph.neutral import preserving_random_state
from lightning_prune.graph.twin import Twin, set_mode
from lightning_prune.planning.timing import placed
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

__all__ = ["Watcher", "at_widths"]

Forward = Callable[..., Any]
Watcher = Callable[[nn.Module, Forward], Forward]
"""Given a module and the forward function of its twin, returns the function to run in place of that."""

_FILL = 0.01  # zeros would be faster on some machines


@contextmanager
def at_widths(graph: ChannelGraph, widths: Mapping[str, int], watcher: Watcher | None = None) -> Iterator[Forward]:
    """Give the traced submodule the shapes it has at some widths for a while; the values are without meaning.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent keep all channels, and what the graph does not know as a
            group, of another submodule or ignored by now, stays as it is.
        watcher: Given a module and the forward function of its twin, returns the function to run in place of that.

    Returns:
        A context that yields a function without arguments, which runs the submodule on the example inputs.
    """
    submodule = graph.model.get_submodule(graph.module)
    kept = {name: torch.arange(width) for name, width in widths.items() if name in graph.groups}
    beside = _beside(graph)
    plan = graph.plan(kept)
    plan = plan.after(beside)
    shapes = {**graph.shapes, **plan.pruned_shapes()}
    tensors = graph.tensors()
    resized = {name: tensor for name, tensor in tensors.items() if tuple(tensor.shape) != shapes[name]}
    stand_ins = {id(tensor): _stand_in(tensor, shapes[name]) for name, tensor in resized.items()}
    args, kwargs = placed(graph.example_inputs, submodule)
    with torch.no_grad(), as_written(), preserving_random_state(submodule):
        twin = Twin(submodule, stand_ins)
        adapt(twin.model, plan, plan_in_force(graph.model), graph.module)
        set_mode(twin.model, training=False)
        let_in(twin.model, graph.example_inputs)
        if watcher is not None:
            for original, module in twin.pairs():
                vars(module)["forward"] = watcher(original, module.forward)
        yield lambda: twin.model(*args, **kwargs)


def _beside(graph: ChannelGraph) -> PruningPlan:
    """Return what has been pruned of groups that are none of the graph's."""
    earlier = plan_in_force(graph.model) or PruningPlan()
    groups = {name: planned for name, planned in earlier.groups.items() if name not in graph.groups}
    adaptations = {name: one for name, one in earlier.adaptations.items() if one.groups() & groups.keys()}
    return PruningPlan(groups, earlier.shapes, adaptations=adaptations)


def _stand_in(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of some shape, with device, precision and memory format of another."""
    stand_in = torch.full(shape, _FILL, device=tensor.device)
    stand_in = stand_in.to(tensor.dtype)
    if _is_channels_last(tensor):
        return stand_in.contiguous(memory_format=torch.channels_last)
    return stand_in


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)
