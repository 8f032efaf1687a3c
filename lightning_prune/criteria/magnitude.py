"""Rank channels by the norm of the weights that make them."""

import math

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.modules import named_tensors

__all__ = ["magnitude"]


def magnitude(graph: ChannelGraph, p: float = 1.0) -> dict[str, Tensor]:
    """Score channels by the norm of their filters, over all layers that make the channel.

    Scores are divided by their mean within the group, so that groups can be compared; without that, layers whose
    weights are small for reasons of scale would vanish first.

    Args:
        graph: The traced model; the weights are read as they are now.
        p: Order of the norm, above 0: 1 for the sum of absolute values, 2 for the Euclidean norm.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been removed.

    Raises:
        ValueError: If ``p`` is not above 0.

    Note:
        The L1 norm of a filter as its importance is that of Li et al., "Pruning Filters for Efficient ConvNets" (ICLR
        2017). Summing over coupled layers and comparing groups by their mean are choices made here; the paper sets
        the ratio of each layer by hand.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 1.0]]))
        >>> magnitude(trace(model, torch.zeros(1, 2)))["0"]
        tensor([1.0000, 1.5000, 0.5000])
    """
    if not p > 0:
        raise ValueError(f"p must be the order of a norm, above 0; got {p!r}.")
    tensors = named_tensors(graph.model)
    scores = {}
    for name, group in graph.groups.items():
        each = [torch.linalg.vector_norm(graph.rows(name, part, tensors), p, dim=1).cpu() for part in group.producers]
        norms = torch.linalg.vector_norm(torch.stack(each), p, dim=0)
        scores[name] = torch.full((group.size,), -math.inf, dtype=norms.dtype)
        scores[name][graph.live(name)] = norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
    return scores
