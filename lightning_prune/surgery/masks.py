"""Masks: channels that are still there but that no layer behind them reads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning_plan import PlannedGroup, PruningPlan
from lightning_prune.surgery.replacing import in_place, of_zeros

__all__ = ["in_positions_of_pruned", "mask", "pruned_channels"]


@torch.no_grad()
def mask(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Zero the in-channel slices of the channels that a plan prunes, in place; outputs are then those of pruning.

    The channels themselves are not zeroed: a normalisation or an activation in between
    may turn a zero into something else. If anything fails, nothing has been zeroed.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels to keep.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> mask(graph, graph.plan({"0": torch.tensor([0, 2])}))
        >>> model[2].weight[0, 1].item()
        0.0
    """
    tensors = graph.tensors()
    zeros = []
    for name, axis, positions in in_positions_of_pruned(graph, plan):
        zeros.append(of_zeros(tensors[name], axis, positions))
    with in_place(zeros):
        pass


def in_positions_of_pruned(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[str, int, Tensor]]:
    """Yield where tensors consume channels that a plan prunes and that the model still has.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels to keep.

    Yields:
        Name of the tensor, axis, (n,) int64 positions along it as the model is now.
    """
    for name, planned in plan.groups.items():
        channels = pruned_channels(graph, name, planned)
        if not len(channels):
            continue
        for in_slice in graph.group(name).in_slices:
            yield in_slice.tensor, in_slice.axis, graph.positions_now(in_slice, channels)


def pruned_channels(graph: ChannelGraph, name: str, planned: PlannedGroup) -> Tensor:
    """Return the channels of a group that a plan prunes and that the model still has, as (n,) int64."""
    channels = graph.kept(name)
    is_kept = torch.isin(channels, planned.channels)
    return channels[~is_kept]
