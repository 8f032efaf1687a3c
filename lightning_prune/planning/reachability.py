"""Reachability of budgets: the least fraction of the cost of a network that rounding and limits allow."""

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.limits import WidthSettings
from lightning_prune.planning.metrics import metric_named

__all__ = ["check_reachable", "reachable"]


def reachable(
    graph: ChannelGraph, metric: str, round_to: int | str = 8, min_channels: int = 1, cap: float = 1.0
) -> float:
    """Return the least fraction of the original cost that can be kept.

    Args:
        graph: The traced model.
        metric: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"``, as the profile predicts it.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 2)), torch.zeros(1, 2))
        >>> reachable(graph, "channels", round_to=4)
        0.25
    """
    chosen = metric_named(metric)
    limits = chosen.least_limits(graph, WidthSettings(round_to, min_channels, cap))
    return limits.reachable(chosen.cost_model(graph))


def check_reachable(
    graph: ChannelGraph, keep: float, metric: str, round_to: int | str = 8, min_channels: int = 1, cap: float = 1.0
) -> None:
    """Raise a ValueError, with the range that can be reached, if a budget cannot.

    Where the profile of the network says that a budget of time cannot be reached, the smallest network is timed.

    Args:
        graph: The traced model.
        keep: Fraction of the original cost that may be kept.
        metric: ``"flops"``, ``"params"``, ``"channels"`` or ``"latency"``.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].

    Raises:
        ValueError: If the budget cannot be reached, or a setting is out of range.
    """
    metric_named(metric).check_reachable(graph, keep, WidthSettings(round_to, min_channels, cap))
