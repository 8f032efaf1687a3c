"""What a plan costs, as a function of the widths of the groups: exact for FLOPs, parameters and channels."""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_prune.graph.channel_graph import Axis, ChannelGraph

__all__ = ["METRICS", "CostModel", "Products", "check_metric"]

METRICS = ("flops", "params", "channels")  # what can be counted; "latency" has to be measured


class CostModel:
    """Count the cost of a network from the widths of its channel groups, without building the network.

    Costs are for the example inputs that the graph was traced with. One FLOP is one fused multiply-add, and the count
    is that of fvcore's ``FlopCountAnalysis`` on the pruned network in evaluation mode, to the unit. Channels are the
    outputs of all layers that make channels of some group.

    Args:
        graph: The traced model.
        metric: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"`` once the graph has been profiled.

    Raises:
        ValueError: If the metric is unknown, or has not been measured.

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
        if metric not in graph.terms:
            raise ValueError(
                "The latency of this network has not been measured; call lightning_prune.planning.profile."
            )
        self.metric = metric
        self.groups = list(graph.groups)
        self.sizes = np.array([graph.groups[name].size for name in self.groups], dtype=np.int64)
        terms = graph.terms[metric]
        self._coefficients = np.array([term.coefficient for term in terms])
        # Only what can become fewer counts as a channel.
        self._products = Products([term.axes for term in terms], self.groups, fixed=metric != "channels")

    @property
    def original(self) -> float:
        """The cost of the original network; a whole number but for latency, which is in milliseconds."""
        return self.of(self.sizes)

    def of(self, widths: np.ndarray) -> float:
        """Return the cost at some widths.

        Args:
            widths: (groups,) int64 channels that stay, in the order of ``self.groups``.
        """
        return (self._coefficients * self._products.of(widths)).sum().item()

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Return the cost at some widths, by group name; groups that are absent are whole."""
        return self.of(np.array([widths.get(name, size) for name, size in zip(self.groups, self.sizes, strict=True)]))


class Products:
    """The products of the lengths of axes, as functions of the widths of the groups.

    Args:
        axes: The factors of each product.
        groups: Names of the groups, in the order that widths come in.
        fixed: Whether positions that no group can lose count.
    """

    def __init__(self, axes: Sequence[tuple[Axis, ...]], groups: Sequence[str], fixed: bool = True) -> None:
        rows: dict[Axis, int] = {Axis(1, ()): 0}
        deepest = max(map(len, axes), default=0)
        factors = [[rows.setdefault(axis, len(rows)) for axis in each] for each in axes]
        self._factors = np.array([row + [0] * (deepest - len(row)) for row in factors], dtype=np.int64)
        self._factors = self._factors.reshape(len(axes), deepest)
        self._fixed = np.array([axis.fixed for axis in rows], dtype=np.int64)
        self._per_channel = np.zeros((len(rows), len(groups)), dtype=np.int64)
        number = {name: i for i, name in enumerate(groups)}
        for row, axis in enumerate(rows):
            for name, positions in axis.groups:
                self._per_channel[row, number[name]] = positions
        if not fixed:
            self._fixed[1:] = 0

    def of(self, widths: np.ndarray) -> np.ndarray:
        """Return the products at some widths.

        Args:
            widths: (groups,) int64 channels that stay.

        Returns:
            (products,) int64.
        """
        lengths = self._fixed + self._per_channel @ widths
        return lengths[self._factors].prod(axis=1)


def check_metric(metric: str) -> None:
    """Raise a ValueError unless the metric is known."""
    if metric not in (*METRICS, "latency"):
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, latency; got {metric!r}.")
