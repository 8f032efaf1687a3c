"""The cost of a network as a function of the widths of its groups, without building the network."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from lightning_prune.graph.channel_graph import Axis, ChannelGraph

__all__ = ["CostModel", "Products", "integers"]

_ONE = Axis(1, ())  # the length that pads products of few axes


class CostModel:
    """Know the cost of a network at any widths of its channel groups.

    Costs are for the example inputs that the graph was traced with. One FLOP is one fused multiply-add, and the count
    is that of fvcore's ``FlopCountAnalysis`` on the pruned network in evaluation mode, to the unit, and with what that
    leaves out by mistake (see `lightning_prune.graph.costs`). Channels are the outputs of all layers that produce
    channels of some group.

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
        if metric not in graph.terms:
            raise ValueError(
                f"The cost of this network is known in {', '.join(graph.terms)}, not in {metric!r}; latency is known "
                "once lightning_prune.planning.profile has measured it."
            )
        terms = graph.terms[metric]
        factors = [graph.axes_of(term) for term in terms]
        if metric == "channels":
            factors = [_of_groups(axes) for axes in factors]
        self.metric = metric
        self.groups = list(graph.groups)
        self.sizes = integers(group.size for group in graph.groups.values())
        self._coefficients = np.array([term.coefficient for term in terms])
        self._products = Products(factors, self.groups)

    @property
    def original(self) -> float:
        """The cost of the original network; a whole number but for latency, which is in milliseconds."""
        return self.of(self.sizes)

    def of(self, widths: np.ndarray) -> float:
        """Return the cost at some widths.

        Args:
            widths: (groups,) int64 channels that are kept, in the order of ``self.groups``.
        """
        return self.of_terms(widths).sum().item()

    def of_terms(self, widths: np.ndarray) -> np.ndarray:
        """Return what each term costs at some widths: (..., terms).

        Args:
            widths: (..., groups) int64 channels that are kept, in the order of ``self.groups``.
        """
        return self._coefficients * self._products.of(widths)

    def terms_of(self, group: int) -> np.ndarray:
        """Return the numbers of the terms that depend on the width of a group.

        Args:
            group: Its number.
        """
        return self._products.of_group(group)

    def only(self, terms: np.ndarray) -> "CostModel":
        """Return the cost of some terms alone.

        Args:
            terms: (n,) their numbers.
        """
        some = copy.copy(self)
        some._coefficients = self._coefficients[terms]
        some._products = self._products.only(terms)
        return some

    def fraction(self, widths: np.ndarray) -> float:
        """Return the cost at some widths as a fraction of the original cost; 1 where there is none to save.

        Args:
            widths: (groups,) int64 channels that are kept, in the order of ``self.groups``.
        """
        original = self.original
        return self.of(widths) / original if original else 1.0

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Return the cost at some widths, by group name; groups that are absent keep all channels."""
        original = zip(self.groups, self.sizes, strict=True)
        complete = integers(widths.get(name, size) for name, size in original)
        return self.of(complete)


class Products:
    """Products of the lengths of axes, as functions of the widths of the groups.

    Args:
        factors: The axes whose lengths are multiplied, for each product.
        groups: Names of the groups, in the order that widths come in.

    Example:
        >>> inputs, outputs = Axis(3, ()), Axis(0, (("0", 1),))
        >>> Products([(inputs, outputs), (outputs,)], ["0"]).of(np.array([5]))
        array([15,  5])
    """

    def __init__(self, factors: Sequence[tuple[Axis, ...]], groups: Sequence[str]) -> None:
        axes = list(dict.fromkeys([_ONE, *chain.from_iterable(factors)]))
        self._fixed = integers(axis.fixed for axis in axes)
        self._per_channel = _positions_per_channel(axes, groups)
        self._multiples = integers(axis.multiple for axis in axes)
        self._unfilled = integers(axis.unfilled for axis in axes)
        self._factors = _rows_of_factors(axes, factors)

    def of(self, widths: np.ndarray) -> np.ndarray:
        """Return the products at some widths.

        Args:
            widths: (..., groups) int64 channels that are kept.

        Returns:
            (..., products) int64.
        """
        lengths = self._fixed + widths @ self._per_channel.T  # (..., axes)
        blocks = -(-lengths // self._multiples)
        rounded_up = blocks * self._multiples
        copied = np.flatnonzero(self._unfilled)
        for axis in copied.tolist():
            rounded_up[..., axis] *= self._is_unfilled(axis, widths)
        factors = rounded_up[..., self._factors]
        return factors.prod(axis=-1)

    def _is_unfilled(self, axis: int, widths: np.ndarray) -> np.ndarray:
        """Tell at which widths the channels of some group do not fill the blocks of an axis: (...) bool."""
        per_channel = self._per_channel[axis]
        left_over = widths * per_channel % self._unfilled[axis]
        return left_over.any(axis=-1)

    def of_group(self, group: int) -> np.ndarray:
        """Return the numbers of the products that have an axis of a group, given by number: (n,)."""
        is_longer = self._per_channel[:, group] > 0  # (axes,)
        return np.flatnonzero(is_longer[self._factors].any(axis=1))

    def only(self, numbers: np.ndarray) -> "Products":
        """Return some of the products, given by number."""
        axes, factors = np.unique(self._factors[numbers], return_inverse=True)
        some = copy.copy(self)
        some._fixed = self._fixed[axes]
        some._per_channel = self._per_channel[axes]
        some._multiples = self._multiples[axes]
        some._unfilled = self._unfilled[axes]
        some._factors = factors.reshape(len(numbers), -1)
        return some


def integers(numbers: Iterable[int]) -> np.ndarray:
    """Return whole numbers as an array: (n,) int64.

    Example:
        >>> integers([1, 2]).dtype
        dtype('int64')
    """
    return np.array(list(numbers), dtype=np.int64)


def _positions_per_channel(axes: Sequence[Axis], groups: Sequence[str]) -> np.ndarray:
    """Return how many positions of each axis one channel of each group takes: (axes, groups)."""
    column_of = {name: column for column, name in enumerate(groups)}
    per_channel = np.zeros((len(axes), len(groups)), dtype=np.int64)
    for row, axis in enumerate(axes):
        for name, positions in axis.groups:
            column = column_of[name]
            per_channel[row, column] = positions
    return per_channel


def _rows_of_factors(axes: Sequence[Axis], factors: Sequence[tuple[Axis, ...]]) -> np.ndarray:
    """Return the number of each axis that is a factor, and 0, that of the length 1, where a product has fewer.

    Returns:
        (products, most factors).
    """
    row_of = {axis: row for row, axis in enumerate(axes)}
    most = max(map(len, factors), default=0)
    rows = np.zeros((len(factors), most), dtype=np.int64)
    for number, product in enumerate(factors):
        rows[number, : len(product)] = [row_of[axis] for axis in product]
    return rows


def _of_groups(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Return axes without the positions that no group can lose: only what can be pruned counts as a channel."""
    return tuple(Axis(0, axis.groups) for axis in axes)
