"""What a plan costs: FLOPs, parameters and channels as exact functions of the widths of the groups."""

from collections.abc import Mapping

import numpy as np

from lightning_prune.graph.channel_graph import Axis, ChannelGraph

__all__ = ["METRICS", "CostModel"]

METRICS = ("flops", "params", "channels")


class CostModel:
    """Count the cost of a network from the widths of its channel groups, without building the network.

    Costs are for the example inputs that the graph was traced with. One FLOP is one fused multiply-add, and the count
    is that of fvcore's ``FlopCountAnalysis`` on the pruned network in evaluation mode, to the unit. Channels are the
    outputs of all layers that make channels of some group.

    Args:
        graph: The traced model.
        metric: ``"flops"``, ``"params"`` or ``"channels"``.

    Raises:
        ValueError: If the metric is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> cost = CostModel(trace(model, torch.zeros(1, 1, 8, 8)), "flops")
        >>> cost.original, cost({"0": 1})  # 36 positions x 9 weights x 1 input x 4 outputs + 144 x 2
        (1584, 396)
    """

    def __init__(self, graph: ChannelGraph, metric: str) -> None:
        check_metric(metric)
        self.metric = metric
        self.groups = list(graph.groups)
        self.sizes = np.array([graph.groups[name].size for name in self.groups], dtype=np.int64)
        rows: dict[Axis, int] = {Axis(1, ()): 0}
        terms = graph.terms[metric]
        deepest = max((len(term.axes) for term in terms), default=0)
        factors = [[rows.setdefault(axis, len(rows)) for axis in term.axes] for term in terms]
        self._factors = np.array([row + [0] * (deepest - len(row)) for row in factors], dtype=np.int64)
        self._factors = self._factors.reshape(len(terms), deepest)
        self._coefficients = np.array([term.coefficient for term in terms], dtype=np.int64)
        self._fixed = np.array([axis.fixed for axis in rows], dtype=np.int64)
        self._per_channel = np.zeros((len(rows), len(self.groups)), dtype=np.int64)
        number = {name: i for i, name in enumerate(self.groups)}
        for row, axis in enumerate(rows):
            for name, positions in axis.groups:
                self._per_channel[row, number[name]] = positions
        if metric == "channels":  # only what can become fewer
            self._fixed[1:] = 0

    @property
    def original(self) -> int:
        """The cost of the original network."""
        return self.of(self.sizes)

    def of(self, widths: np.ndarray) -> int:
        """Return the cost at some widths.

        Args:
            widths: (groups,) int64 channels that stay, in the order of ``self.groups``.
        """
        lengths = self._fixed + self._per_channel @ widths
        return int((self._coefficients * lengths[self._factors].prod(axis=1)).sum())

    def __call__(self, widths: Mapping[str, int]) -> int:
        """Return the cost at some widths, by group name; groups that are absent are whole."""
        return self.of(np.array([widths.get(name, size) for name, size in zip(self.groups, self.sizes, strict=True)]))


def check_metric(metric: str) -> None:
    """Raise a ValueError unless the metric is known."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}.")
