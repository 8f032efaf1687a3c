"""Criterion on the norm of all weights that belong to a channel, renewed with each channel that is pruned."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.graph.substitution import named_tensors

__all__ = ["group_magnitude"]

_TINY = np.finfo(float).tiny


@register("group_magnitude")
def group_magnitude(graph: ChannelGraph) -> Scores:
    """Score channels by when they would be pruned, if the one with the least weight for its group always came next.

    The weight of a channel is the squared norm of all matrices and filters that produce it and that consume it, divided
    by the mean of the kept channels of its group. What is pruned with a channel counts no more for the channels on the
    other side of those weights. The score is that quotient at the moment when the channel is pruned, and always above
    that of one that was pruned before: in the order of the scores, channels are pruned as they would be if all were
    scored anew after each.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.

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
    norms = _CoupledNorms(graph)
    scores = {name: torch.zeros(len(graph.kept(name)), dtype=torch.float64) for name in graph.groups}
    smallest = {name: norms.smallest(name) for name in graph.groups}  # of the groups that have channels to prune
    score = 0.0
    while smallest:
        name = min(smallest, key=lambda name: smallest[name].relative_norm)
        channel = smallest[name].channel
        just_above = math.nextafter(score, math.inf)  # no two scores alike: the order is what counts
        score = max(smallest[name].relative_norm, just_above)
        scores[name][channel] = score
        changed = norms.prune(name, channel)
        for other in changed & smallest.keys():
            smallest[other] = norms.smallest(other)
        if smallest[name].relative_norm == math.inf:  # that was the last one
            del smallest[name]
    return to_original_channels(graph, scores)


@dataclass(frozen=True)
class _Smallest:
    """The channel of a group with the smallest squared norm.

    Attributes:
        channel: Its place among the channels that the model has now.
        relative_norm: Its squared norm, divided by the mean of its group; ``inf`` if all channels are pruned.
    """

    channel: int
    relative_norm: float


@dataclass(frozen=True)
class _Place:
    """Where the channels of a group lie along an axis of a tensor.

    Attributes:
        group: The group.
        axis: The axis.
        positions: (channels, positions of a channel).
    """

    group: str
    axis: int
    positions: np.ndarray


class _CoupledNorms:
    """The squared norms of all channels, over the matrices and filters that produce or consume them.

    Attributes:
        of_kept: (kept channels,) for each group, those that the model has now; ``inf`` for one that is pruned here.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.of_kept = {name: np.zeros(len(graph.kept(name))) for name in graph.groups}
        tensors = named_tensors(graph.model)
        self._places = _places_by_tensor(graph, tensors)
        self._tensors = {name: _tensors_of(group, self._places) for name, group in graph.groups.items()}
        self._squares: dict[str, np.ndarray] = {}  # by tensor
        for name, places in self._places.items():
            axes = {place.axis for place in places}
            squares = _squares_along(axes, tensors[name])
            self._squares[name] = squares
            for place in places:
                self.of_kept[place.group] += _sums_of_channels(squares, place)

    def smallest(self, group: str) -> _Smallest:
        """Return the channel of a group that would be pruned next."""
        norms = self.of_kept[group]
        kept = norms[np.isfinite(norms)]
        mean = float(kept.mean()) if len(kept) else 1.0
        channel = int(norms.argmin())
        norm = max(float(norms[channel]), 0.0)  # rounding may make it a little less than nothing
        return _Smallest(channel, norm / max(mean, _TINY))

    def prune(self, group: str, channel: int) -> set[str]:
        """Prune a channel, and return the groups whose norms have changed."""
        changed = {group}
        for tensor in self._tensors[group]:
            places = self._places[tensor]
            for place in places:
                if place.group != group:
                    continue
                positions = place.positions[channel]
                pruned = self._squares[tensor].take(positions, place.axis)
                changed |= self._subtract(pruned, place.axis, places)
        self.of_kept[group][channel] = np.inf
        return changed

    def _subtract(self, pruned: np.ndarray, axis: int, places: list[_Place]) -> set[str]:
        """Take what is pruned along one axis from the channels along the others; return their groups."""
        crossing = [place for place in places if place.axis != axis]
        for place in crossing:
            self.of_kept[place.group] -= _sums_of_channels(pruned, place)
        return {place.group for place in crossing}


def _places_by_tensor(graph: ChannelGraph, tensors: Mapping[str, Tensor]) -> dict[str, list[_Place]]:
    """Return where the channels of all groups lie in matrices and filters."""
    places: defaultdict[str, list[_Place]] = defaultdict(list)
    for name, group in graph.groups.items():
        kept = graph.kept(name)
        for where in group.slices:
            if tensors[where.tensor].dim() == 1:  # a bias, or a scale of normalisation
                continue
            positions = graph.positions_now(where, kept).reshape(len(kept), -1)
            place = _Place(name, where.axis, positions.numpy())
            places[where.tensor].append(place)
    return places


def _tensors_of(group: Group, places: Collection[str]) -> list[str]:
    """Return the names of the matrices and filters that a group lies in, each once."""
    names = dict.fromkeys(where.tensor for where in group.slices)
    return [name for name in names if name in places]


def _squares_along(axes: Collection[int], tensor: Tensor) -> np.ndarray:
    """Return the squares of a tensor, summed over all axes but some, which stay as axes of length 1."""
    weights = tensor.detach().cpu()
    precise = torch.promote_types(weights.dtype, torch.float32)
    squares = weights.to(precise).square()  # 10^8 of them in a VGG-16
    others = [axis for axis in range(squares.dim()) if axis not in axes]
    if others:
        squares = squares.sum(others, keepdim=True, dtype=torch.float64)
    return squares.numpy()


def _sums_of_channels(squares: np.ndarray, place: _Place) -> np.ndarray:
    """Return the sum of the squares that lie in each channel: (channels,)."""
    others = tuple(axis for axis in range(squares.ndim) if axis != place.axis)
    along_axis = squares.sum(axis=others, dtype=np.float64)  # (positions,)
    return along_axis[place.positions].sum(1)
