"""Plans by score: the channels of all groups compete for the budget."""

from collections.abc import Mapping

from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.budget import check_keep
from lightning_prune.planning.limits import WidthSettings
from lightning_prune.planning.metrics import metric_named
from lightning_prune.planning.ranking import check_ranking, isomorphic_ranking
from lightning_prune.planning.scores import checked_scores
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["plan"]


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int | str = 8,
    min_channels: int = 1,
    ranking: str = "global",
) -> PruningPlan:
    """Choose the channels to keep: the best of all groups together that fit the budget.

    Channels of all groups are ranked in one list. The lowest are pruned until the rest, rounded, fits the budget; what
    rounding saved of the budget is given back step by step to the groups whose next channels score highest. Where more
    than a twentieth of the budget is left even so, groups exchange channels for better ones. If that is not enough, the
    one group that rounding is too coarse for keeps a finer multiple, which a warning tells, or groups exchange channels
    for worse ones. With an isomorphic ranking there is a list for each class of groups that are built alike, and the
    same share of each list is pruned.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of each group, higher is kept; ``-inf`` for channels that the model
            no longer has. Scores of different groups must be comparable. Groups that are absent keep all channels.
        keep: Fraction of the original cost that may be kept, in (0, 1].
        metric: What the fraction is of: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"``, which is timed on
            the device where the model is; see `lightning_prune.planning.by_time`.
        round_to: Layers that lose channels keep a multiple of this many; 1 for no rounding; for latency also
            ``"auto"``, the multiple that keeps most on this device.
        min_channels: Least number of channels of a group.
        ranking: With which others a channel is compared: ``"global"`` for those of all groups, or ``"isomorphic"`` for
            those of the groups that are built alike, see `lightning_prune.planning.isomorphic_groups`: scores of heads
            and of hidden channels, or of layers and their downsampling, need not be comparable then.

    Returns:
        The plan. Its ``budget`` tells what was asked, what could be reached, and what was achieved, as fractions, and
        as ``finer`` the one group that keeps a finer multiple, with the multiple, if there is one.

    Raises:
        ValueError: If a setting is out of range, the budget cannot be reached, or scores do not fit the groups.

    Note:
        The isomorphic ranking is that of Fang et al., "Isomorphic Pruning for Vision Models" (ECCV 2024). What is
        alike is told by the slices of a group here, and the share is found so that the budget is met.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import criteria, trace
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = model(torch.zeros(1, 3, 8, 8))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> made = plan(graph, criteria.magnitude(graph), keep=0.5, round_to=8)
        >>> made.budget["achieved"] <= 0.5
        True
    """
    check_keep(keep)
    settings = WidthSettings(round_to, min_channels)
    chosen = metric_named(metric)
    known_scores = checked_scores(graph, scores)
    if check_ranking(ranking) == "isomorphic":
        shares = isomorphic_ranking(graph, known_scores)
        return chosen.plan_by_layer(graph, shares, known_scores, keep, settings)
    return chosen.plan_by_score(graph, known_scores, keep, settings)
