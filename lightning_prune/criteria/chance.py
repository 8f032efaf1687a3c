"""Rank channels at random: the control that every criterion must beat."""

import torch
from torch import Tensor

from lightning_prune.criteria.numbering import number
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["random"]


@register("random")
def random(graph: ChannelGraph, seed: int = 0) -> dict[str, Tensor]:
    """Score channels by uniform random numbers, the same for the same seed.

    The global random state is left alone. A channel keeps its score when others are removed.

    Args:
        graph: The traced model.
        seed: Seed of the random numbers.

    Returns:
        (channels,) score of each group, in [0, 1); ``-inf`` for channels that have been removed.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> bool((random(graph, seed=1)["0"] == random(graph, seed=1)["0"]).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(group.size, generator=generator) for name, group in graph.groups.items()}
    return number(graph, {name: values[graph.kept(name)] for name, values in drawn.items()})
