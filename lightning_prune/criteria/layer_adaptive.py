"""Criterion on the share that a channel has in the weight of its group, once smaller channels are pruned."""

import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["lamp"]


@register("lamp", blocks="none")
def lamp(graph: ChannelGraph) -> Scores:
    """Score channels by their squared norm, divided by that of all channels of the group that are no smaller.

    The score says what fraction of the weight that is still there a channel takes with it, when channels are pruned
    smallest first. The largest channel of every group scores 1, so that no group vanishes.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (channels,) score of each group, in [0, 1], higher is kept; ``-inf`` for channels that have been pruned.

    Note:
        The score is that of Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021), for
        single weights. Interpretation: the weights of all filters that produce a channel take the place of a weight,
        and equal channels are ordered by their number, the first being the smallest.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> lamp(trace(model, torch.zeros(1, 2)))["0"]  # 1 / (1 + 4 + 9), 4 / (4 + 9), 9 / 9
        tensor([0.0714, 0.3077, 1.0000], dtype=torch.float64)
    """
    now = graph.snapshot()
    shares = {}
    for name, group in graph.groups.items():
        squares = torch.zeros((), dtype=torch.float64)
        for place in group.out_slices:
            rows = now.rows(name, place).to("cpu", torch.float64)
            squares = squares + rows.square().sum(1)  # (kept channels,)
        shares[name] = _share_of_no_smaller(squares)
    return to_original_channels(graph, shares)


def _share_of_no_smaller(squares: Tensor) -> Tensor:
    """Return each value divided by the sum of those that are no smaller: (n,)."""
    order = squares.argsort(stable=True)
    ascending = squares[order]
    sums = ascending.flip(0).cumsum(0).flip(0)  # of each value and all that come after it
    smallest = torch.finfo(torch.float64).tiny
    shares = torch.empty_like(squares)
    shares[order] = ascending / sums.clamp_min(smallest)
    return shares
