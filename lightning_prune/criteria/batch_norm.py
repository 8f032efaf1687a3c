"""Criterion on the scale that batch normalisation gives a channel."""

import torch

from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.expected_shares import names_of_scales
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["batch_norm_scale"]


@register("batch_norm_scale")
def batch_norm_scale(graph: ChannelGraph) -> Scores:
    """Score channels by the absolute value of their scale in batch normalisation.

    Args:
        graph: The traced model; the scales are read as they are now.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If a group passes no batch normalisation that has scales.

    Note:
        The criterion is that of Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV
        2017), where channels of all layers compete by it as it stands; the paper also trains with an L1 penalty on the
        scales, which is for the user to add. Interpretation: where a channel passes several normalisations, or takes
        several places in one, the mean counts.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
        >>> _ = model[1].weight.data.copy_(torch.tensor([0.5, -2.0]))
        >>> batch_norm_scale(trace(model, torch.zeros(1, 1, 4, 4)))["0"]
        tensor([0.5000, 2.0000])
    """
    now = graph.snapshot()
    scales = names_of_scales(graph.model)
    means = {}
    for name, group in graph.groups.items():
        places = [place for place in group.other_slices if place.tensor in scales]
        if not places:
            raise ValueError(
                f"Group {name!r} passes no batch normalisation with scales; add {name!r} to ignore, or use another "
                "criterion."
            )
        rows = [now.rows(name, place) for place in places]
        means[name] = torch.cat(rows, dim=1).abs().mean(1)  # (kept channels,)
    return to_original_channels(graph, means)
