"""Plans by layer ratios: one number per group says how much it loses, scores say which channels."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.budget import check_keep
from lightning_prune.planning.limits import WidthSettings
from lightning_prune.planning.metrics import metric_named
from lightning_prune.planning.scores import checked_scores, shares_pruned
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["plan_by_layer"]


def plan_by_layer(
    graph: ChannelGraph,
    layer_scores: Mapping[str, float],
    scores: Mapping[str, Tensor],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int | str = 8,
    min_channels: int = 1,
    cap: float = 0.99,
) -> PruningPlan:
    """Give each group a share of the cut by one number, and choose the channels within it by their scores.

    A group loses the fraction ``min(cap, t / layer score)`` of its channels, with the same ``t`` for all, found by
    bisection so that what is kept, in channels, fits the budget. Equal numbers are the uniform allocation. What
    rounding saved of the budget is given back, step by step, to the groups that are pruned most beyond their share, and
    where that leaves much of it, as with `plan`.

    Args:
        graph: The traced model.
        layer_scores: One number above 0 per group, larger for groups that lose less. Groups that are absent keep all
            channels.
        scores: (channels,) score of each channel of each group, compared within the group only, higher is kept;
            ``-inf`` for channels that the model no longer has. Groups that are absent keep all channels.
        keep: Fraction of the original cost that may be kept, in (0, 1].
        metric: As for `plan`.
        round_to: As for `plan`.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].

    Returns:
        The plan, with the same ``budget`` as that of `plan`.

    Raises:
        ValueError: If a setting is out of range, a layer score is not a finite number above 0, the budget cannot be
            reached, or scores do not fit the groups.

    Note:
        The rule that a layer loses the inverse of its score, there called importance, and the cap of 0.99, are those
        of Lu et al., "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI 2024), whose budget
        counts filters (``metric="channels"``). Solving the budget under the caps is a choice made here.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import criteria, trace
        >>> layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 10)]
        >>> graph = trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8))
        >>> made = plan_by_layer(
        ...     graph, {"0": 1.0, "2": 2.0}, criteria.magnitude(graph), keep=0.625, metric="channels", round_to=1
        ... )
        >>> made.widths  # of 64 channels half are pruned in the one, a quarter in the other
        {'0': 32, '2': 48}
    """
    check_keep(keep)
    known_scores = checked_scores(graph, scores)
    for name, value in layer_scores.items():
        graph.group(name)
        if not 0 < value < math.inf:
            raise ValueError(f"The layer score of group {name!r} must be a finite number above 0; got {value!r}.")
    thresholds = {
        name: _thresholds(channel_scores, layer_scores.get(name, math.inf))
        for name, channel_scores in known_scores.items()
    }
    settings = WidthSettings(round_to, min_channels, cap)
    return metric_named(metric).plan_by_layer(graph, thresholds, known_scores, keep, settings)


def _thresholds(scores: Tensor, layer_score: float) -> Tensor:
    """Return the ``t`` at which each channel is pruned; the channel that scores lowest is pruned first.

    A channel is pruned when the width asked for falls below its place, that is beyond ``t = layer_score * share``, with
    the share of `shares_pruned`. Ranking all channels by these numbers is searching for ``t``.

    Args:
        scores: (channels,) score of each channel of a group.
        layer_score: The number of the group; ``inf`` if it keeps all channels.

    Returns:
        (channels,) float64; ``inf`` and ``-inf`` where the scores are.
    """
    thresholds = layer_score * shares_pruned(scores)
    return torch.where(scores.isinf(), scores, thresholds)
