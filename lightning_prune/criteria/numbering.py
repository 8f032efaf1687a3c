"""What criteria share: numbering scores as in the original model, and making groups comparable."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["divide_by_mean", "divide_by_norm", "number"]


def number(graph: ChannelGraph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give scores of the channels that the model still has their place among the original ones.

    Args:
        graph: The traced model.
        values: (live channels,) score of each channel, by group.

    Returns:
        (channels,) score of each group, on the CPU; ``-inf`` for channels that have been removed.
    """
    scores = {}
    for name, live in values.items():
        scores[name] = torch.full((graph.groups[name].size,), -math.inf, dtype=live.dtype)
        scores[name][graph.kept(name)] = live.detach().cpu()
    return scores


def divide_by_norm(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scores of each group by their Euclidean norm."""
    return {name: live / live.norm().clamp_min(torch.finfo(live.dtype).tiny) for name, live in values.items()}


def divide_by_mean(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scores of each group by their mean."""
    return {name: live / live.mean().clamp_min(torch.finfo(live.dtype).tiny) for name, live in values.items()}
