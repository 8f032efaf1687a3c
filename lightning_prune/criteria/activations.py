"""Rank channels by what is read from them: their mean, or how often it is not zero."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.criteria.numbering import divide_by_norm, number
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.criteria.watching import check_readable, evaluating, sum_positions, unwatch, watch
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["apoz", "mean_activation"]


@register("mean_activation")
def mean_activation(graph: ChannelGraph, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Score channels by the mean of what the layers behind them read, over all examples and positions.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data.
        loss: Given the model and a batch, runs the model; what it returns is not used.

    Returns:
        (channels,) score of each group, divided by its Euclidean norm in the group, higher is kept; ``-inf`` for
        channels that have been removed.

    Raises:
        ValueError: If there is no batch, or a layer that reads channels cannot be watched or was not run.

    Note:
        One of the criteria that Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017) compare with. Interpretation: what counts is read after the activation function, by all
        layers that read the channel alike.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [4.0]]))
        >>> mean_activation(trace(model, torch.zeros(1, 1)), [torch.ones(5, 1)], lambda model, x: model(x).sum())["0"]
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    return number(graph, divide_by_norm(_means(graph, batches, loss, lambda activation: activation)))


@register("apoz")
def apoz(graph: ChannelGraph, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Score channels by how often what the layers behind them read is not zero: 1 less the percentage of zeros.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data.
        loss: Given the model and a batch, runs the model; what it returns is not used.

    Returns:
        (channels,) score of each group, in [0, 1], higher is kept; ``-inf`` for channels that have been removed.

    Raises:
        ValueError: If there is no batch, or a layer that reads channels cannot be watched or was not run.

    Note:
        The average percentage of zeros is that of Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach
        towards Efficient Deep Architectures" (2016). It says something only behind activation functions that return
        zeros, such as ReLU. Interpretation: all layers that read a channel count alike.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [-4.0]]))
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
        >>> apoz(trace(model, torch.zeros(1, 1)), [x], lambda model, x: model(x).sum())["0"]
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    return number(graph, _means(graph, batches, loss, lambda activation: activation != 0))


@torch.no_grad()
def _means(
    graph: ChannelGraph, batches: Iterable[Any], loss: Loss, value: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the mean of a value over all that is read of each channel: (live channels,) by group."""
    check_readable(graph, "The mean over activations")
    sums: dict[str, Tensor] = {}  # by the weight that reads
    counts: dict[str, int] = {}

    def read(tensor: str, activation: Tensor, axis: int) -> None:
        total = sum_positions(value(activation), axis).sum(0, dtype=torch.float64).cpu()
        sums[tensor] = sums[tensor] + total if tensor in sums else total
        counts[tensor] = counts.get(tensor, 0) + activation.numel() // activation.shape[axis]

    handles = watch(graph, read)
    try:
        with evaluating(graph.model):
            for batch in batches:
                loss(graph.model, batch)
    finally:
        unwatch(handles)
    return {name: _mean(graph, name, sums, counts) for name in graph.groups}


def _mean(graph: ChannelGraph, name: str, sums: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
    channels = graph.kept(name)
    readers = [part for part in graph.groups[name].in_slices if part.tensor in sums]
    if not readers:
        raise ValueError(f"Nothing was read of group {name!r}: there is no batch, or the loss does not run the model.")
    each = []
    for part in readers:
        positions = graph.positions_now(part, channels)
        each.append(sums[part.tensor][positions].view(len(channels), -1).mean(1) / counts[part.tensor])
    return torch.stack(each).mean(0)
