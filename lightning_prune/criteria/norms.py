"""Criteria on the norm of the weights that produce a channel."""

import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, divide_by_mean, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["l1", "l2", "magnitude"]

_IN_CACHE = 65_536  # numbers


@register("magnitude", blocks="none")
def magnitude(graph: ChannelGraph, p: float = 1.0) -> Scores:
    """Score channels by the norm of their filters, over all layers that produce the channel.

    Scores are divided by their mean within the group, so that groups can be compared; without that, layers whose
    weights are small for reasons of scale would vanish first.

    Args:
        graph: The traced model; the weights are read as they are now.
        p: Order of the norm, above 0: 1 for the sum of absolute values, 2 for the Euclidean norm.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If ``p`` is not above 0.

    Note:
        The L1 norm of a filter as its score is that of Li et al., "Pruning Filters for Efficient ConvNets" (ICLR
        2017). Summing over coupled layers and comparing groups by their mean are choices made here; the paper sets
        the fraction of each layer by hand.

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
    now = graph.snapshot()
    norms = {}
    for name, group in graph.groups.items():
        by_layer = [_norms(now.rows(name, place), p).cpu() for place in group.out_slices]
        norms[name] = by_layer[0] if len(by_layer) == 1 else _norms(torch.stack(by_layer, dim=1), p)
    return to_original_channels(graph, divide_by_mean(norms))


@register("l1", blocks="none")
def l1(graph: ChannelGraph) -> Scores:
    """Score channels by the sum of the absolute weights of their filters; see `magnitude`."""
    return magnitude(graph, 1)


@register("l2", blocks="none")
def l2(graph: ChannelGraph) -> Scores:
    """Score channels by the Euclidean norm of their filters; see `magnitude`."""
    return magnitude(graph, 2)


def _norms(rows: Tensor, p: float) -> Tensor:
    """Return the norm of each row: (rows,)."""
    precise = torch.promote_types(rows.dtype, torch.float32)  # half precision ends where sums begin
    if p != 1:
        return torch.linalg.vector_norm(rows, p, dim=1, dtype=precise)
    # PyTorch's own L1 norm is several times slower than these sums over rows that fit into the cache.
    rows_in_cache = max(1, _IN_CACHE // max(1, rows.shape[1]))
    sums = [some.abs().sum(1, dtype=precise) for some in rows.split(rows_in_cache)]
    return torch.cat(sums)
