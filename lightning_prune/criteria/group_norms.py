"""Rank channels by the norm of all weights that belong to them, renewed while channels leave."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_prune.criteria.numbering import number
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

__all__ = ["group_magnitude"]


@register("group_magnitude")
def group_magnitude(graph: ChannelGraph) -> dict[str, Tensor]:
    """Score channels by when they would leave, if the one with the least weight for its group always left next.

    The weight of a channel is the squared norm of all matrices and filters that make it and that read it, divided by
    the mean of what is left of its group. What leaves with a channel counts no more for the channels on the other side
    of those weights. The score is that ratio when the channel leaves, and never below that of one that left before: in
    the order of the scores, channels leave as they would if all were scored anew after each.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been removed.

    Note:
        The norm over coupled weights is that of Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023),
        whose code divides it by the mean of the group in each of several steps. Interpretation: here a step is one
        channel, so that no number of steps is to be chosen; biases and normalisation do not count.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0], [0.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[1.0, 2.0, 2.0]]))
        >>> group_magnitude(trace(model, torch.zeros(1, 1)))["0"]  # 2 / mean(2, 8, 4), 8 / mean(8), 4 / mean(8, 4)
        tensor([0.4286, 1.0000, 0.6667], dtype=torch.float64)
    """
    weights = _Weights(graph)
    scores = {name: np.full(len(each), np.nan) for name, each in weights.of_channels.items()}
    least = {name: weights.least(name) for name in scores}
    before = 0.0
    while least:
        name = min(least, key=lambda each: least[each][0])
        ratio, channel = least[name]
        before = max(ratio, np.nextafter(before, np.inf))  # no two alike: the order is what counts
        scores[name][channel] = before
        for each in weights.remove(name, channel) & least.keys():
            least[each] = weights.least(each)
        if least[name][0] == np.inf:  # that was the last one
            del least[name]
    return number(graph, {name: torch.from_numpy(each) for name, each in scores.items()})


class _Part(NamedTuple):
    """Where the channels of a group lie along an axis of the squares of a tensor: (channels, positions of each)."""

    group: str
    axis: int
    positions: np.ndarray


class _Weights:
    """The squared norms of all channels, of which some leave.

    Attributes:
        of_channels: (channels,) for each group, those that it has now; ``inf`` for one that has left here.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.of_channels = {name: np.zeros(len(graph.kept(name))) for name in graph.groups}
        self._squares: dict[str, np.ndarray] = {}
        self._parts: dict[str, list[_Part]] = defaultdict(list)  # by tensor
        self._tensors: dict[str, list[str]] = defaultdict(list)  # of a group
        tensors = named_tensors(graph.model)
        for name, group in graph.groups.items():
            live = graph.kept(name)
            for part in group.slices:
                if tensors[part.tensor].dim() > 1:
                    positions = graph.positions_now(part, live).reshape(len(live), -1).numpy()
                    self._parts[part.tensor].append(_Part(name, part.axis, positions))
                    self._tensors[name].append(part.tensor)
        for tensor, parts in self._parts.items():
            weights = tensors[tensor].detach().cpu()
            squares = weights.to(torch.promote_types(weights.dtype, torch.float32)).square()  # 10^8 in a VGG-16
            apart = {each.axis for each in parts}
            alike = [axis for axis in range(squares.dim()) if axis not in apart]
            self._squares[tensor] = (
                squares.sum(alike, keepdim=True, dtype=torch.float64) if alike else squares
            ).numpy()
            for each in parts:
                self.of_channels[each.group] += _along(self._squares[tensor], each.axis)[each.positions].sum(1)

    def least(self, name: str) -> tuple[float, int]:
        """Return the least norm of a group, divided by the mean of those that are left, and whose it is."""
        norms = self.of_channels[name]
        left = norms[np.isfinite(norms)]
        channel = int(norms.argmin())
        mean = max(float(left.mean()), np.finfo(float).tiny) if len(left) else 1.0
        return max(float(norms[channel]), 0.0) / mean, channel  # rounding may leave a little less than nothing

    def remove(self, name: str, channel: int) -> set[str]:
        """Take a channel out, and return the groups whose norms have changed."""
        changed = {name}
        for tensor in dict.fromkeys(self._tensors[name]):
            squares, parts = self._squares[tensor], self._parts[tensor]
            for own in parts:
                if own.group != name:
                    continue
                leaving = squares.take(own.positions[channel], own.axis)
                for other in parts:
                    if other.axis != own.axis:
                        self.of_channels[other.group] -= _along(leaving, other.axis)[other.positions].sum(1)
                        changed.add(other.group)
        self.of_channels[name][channel] = np.inf
        return changed


def _along(squares: np.ndarray, axis: int) -> np.ndarray:
    """Return the sums over all axes but one."""
    return squares.sum(axis=tuple(other for other in range(squares.ndim) if other != axis), dtype=np.float64)
