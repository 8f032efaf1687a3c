"""Masks: channels that are still there but that nobody reads."""

import torch

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.modules import named_tensors
from lightning_prune.plan import PruningPlan

__all__ = ["zero_removed"]


@torch.no_grad()
def zero_removed(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Zero what is read from the channels that a plan removes, in place; the network then computes what pruning leaves.

    What is zeroed is the input side of the layers behind the channels, not the channels themselves: a normalisation or
    an activation in between may turn a zero into something else.

    Args:
        graph: The traced model, in its original shape.
        plan: The channels that stay.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> zero_removed(graph, graph.plan({"0": torch.tensor([0, 2])}))
        >>> model[2].weight[0, 1].item()
        0.0
    """
    tensors = named_tensors(graph.model)
    for name, group in plan.groups.items():
        for part in graph.group(name).readers:
            tensor = tensors[part.tensor]
            tensor.index_fill_(part.axis, part.positions(group.removed).to(tensor.device), 0)
