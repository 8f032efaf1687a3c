"""Criterion on the distance of a channel from the other channels of its group."""

import torch

from lightning_prune.criteria.channel_scores import Scores, divide_by_mean, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["fpgm"]


@register("fpgm", blocks="none")
def fpgm(graph: ChannelGraph) -> Scores:
    """Score channels by the sum of the Euclidean distances of their filters to all others of the group.

    A filter close to all others, near their geometric median, is one that the others can replace.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (channels,) score of each group, divided by its mean in the group, higher is kept; ``-inf`` for channels that
        have been pruned.

    Note:
        The criterion is that of He et al., "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration"
        (CVPR 2019), which prunes the same fraction of each layer. Interpretation: filters of coupled layers that
        produce the same channel are joined to one vector, and the mean makes groups comparable.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        >>> distances = fpgm(trace(model, torch.zeros(1, 2)))["0"]  # 5 + 1, 5 + 18 ** 0.5, 1 + 18 ** 0.5
        >>> distances.argsort().tolist()
        [2, 0, 1]
    """
    now = graph.snapshot()
    sums = {}
    for name, group in graph.groups.items():
        rows = [now.rows(name, place).to("cpu", torch.float64) for place in group.out_slices]
        filters = torch.cat(rows, dim=1)  # (kept channels, weights of a channel)
        distances = torch.cdist(filters, filters)
        distances.fill_diagonal_(0.0)  # which rounding may have made more
        sums[name] = distances.sum(1)
    return to_original_channels(graph, divide_by_mean(sums))
