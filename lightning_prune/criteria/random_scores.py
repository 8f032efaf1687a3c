"""Criterion at random: the control that every other one must beat."""

import torch

from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["random"]


@register("random", blocks="own")
def random(graph: ChannelGraph, seed: int = 0) -> Scores:
    """Score channels by uniform random numbers, the same for the same seed.

    The global random state does not change. A channel keeps its score when others are pruned.

    Args:
        graph: The traced model.
        seed: Seed of the random numbers.

    Returns:
        (channels,) score of each group, in [0, 1); ``-inf`` for channels that have been pruned.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> bool((random(graph, seed=1)["0"] == random(graph, seed=1)["0"]).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    now = graph.snapshot({})
    for name, group in graph.groups.items():
        drawn = torch.rand(group.size, generator=generator)  # (channels,) of the original group
        scores[name] = drawn[now.kept(name)]
    return to_original_channels(graph, scores)
