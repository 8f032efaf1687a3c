"""Masks: channels that are still there but that nobody reads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PlannedGroup, PruningPlan

__all__ = ["in_positions_of_pruned", "mask", "pruned_channels"]


@torch.no_grad()
def mask(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Zero what is read from the channels that a plan removes, in place; the network then computes what pruning leaves.

    What is zeroed is the input side of the layers behind the channels, not the channels themselves: a normalisation or
    an activation in between may turn a zero into something else.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels that stay.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> mask(graph, graph.plan({"0": torch.tensor([0, 2])}))
        >>> model[2].weight[0, 1].item()
        0.0
    """
    tensors = named_tensors(graph.model)
    for name, axis, positions in in_positions_of_pruned(graph, plan):
        tensors[name].index_fill_(axis, positions.to(tensors[name].device), 0)


def in_positions_of_pruned(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[str, int, Tensor]]:
    """Yield where tensors read channels that a plan removes and that the model still has.

    Yields:
        Name of the tensor, axis, (n,) int64 positions along it as the model is now.
    """
    for name, group in plan.groups.items():
        channels = pruned_channels(graph, name, group)
        for part in graph.group(name).in_slices if len(channels) else ():
            yield part.tensor, part.axis, graph.positions_now(part, channels)


def pruned_channels(graph: ChannelGraph, name: str, group: PlannedGroup) -> Tensor:
    """Return the channels of a group that a plan removes and that the model still has, as (n,) int64."""
    live = graph.kept(name)
    return live[~torch.isin(live, torch.tensor(group.kept))]
