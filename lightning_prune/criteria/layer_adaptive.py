"""Rank channels by their share of the weight that is left in their group."""

import torch
from torch import Tensor

from lightning_prune.criteria.numbering import number
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

__all__ = ["lamp"]


@register("lamp")
def lamp(graph: ChannelGraph) -> dict[str, Tensor]:
    """Score channels by their squared norm, divided by that of all channels of the group that are no smaller.

    The score says how much of what would still be there is lost, when channels leave smallest first. The largest
    channel of every group scores 1, so that no group vanishes.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (channels,) score of each group, in [0, 1], higher is kept; ``-inf`` for channels that have been removed.

    Note:
        The score is that of Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021), for
        single weights. Interpretation: the weights of all filters that make a channel take the place of a weight, and
        equal channels are ordered by their number, the first being the smallest.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> lamp(trace(model, torch.zeros(1, 2)))["0"]  # 1 / (1 + 4 + 9), 4 / (4 + 9), 9 / 9
        tensor([0.0714, 0.3077, 1.0000], dtype=torch.float64)
    """
    tensors = named_tensors(graph.model)
    shares = {}
    for name, group in graph.groups.items():
        rows = (graph.rows(name, part, tensors).to("cpu", torch.float64) for part in group.out_slices)
        squares = sum((part.square().sum(1) for part in rows), torch.zeros((), dtype=torch.float64))
        order = squares.argsort(stable=True)
        left = squares[order].flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
        shares[name] = torch.empty_like(squares)
        shares[name][order] = squares[order] / left
    return number(graph, shares)
