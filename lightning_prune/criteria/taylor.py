"""Rank channels by activation times gradient, the first-order estimate of what removing them does to the loss."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["channel_effects", "normalize_by_group"]


def channel_effects(activation: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """Return the first-order change of the loss when a channel of one example is set to zero.

    Args:
        activation: (n, ...) what a layer reads.
        gradient: The gradient of the loss with respect to it, of the same shape.
        axis: The axis of the channels.

    Returns:
        (n, channels): activation times gradient, summed over all other axes.

    Example:
        >>> activation, gradient = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, -1.0], [0.5, 0.5]]])
        >>> channel_effects(activation, gradient, axis=1)
        tensor([[-1.0000,  3.5000]])
    """
    product = (activation * gradient).movedim(axis, 1)
    dtype = torch.promote_types(product.dtype, torch.float32)  # sums of half precision lose the small terms
    return product.flatten(2).sum(2, dtype=dtype) if product.dim() > 2 else product.to(dtype)


def normalize_by_group(graph: ChannelGraph, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scores of each group by their Euclidean norm, so that groups can be compared.

    Args:
        graph: The traced model.
        sums: (channels,) unnormalised score of each channel, by group.

    Returns:
        (channels,) score of each group; ``-inf`` for channels that have been removed.
    """
    scores = {}
    for name, group in graph.groups.items():
        live = graph.live(name)
        values = sums[name].detach().to("cpu", torch.float64)[live]
        scores[name] = torch.full((group.size,), -math.inf, dtype=torch.float64)
        scores[name][live] = values / values.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return scores
