"""Criterion on the norm of all weights that belong to a channel, renewed with each channel that is pruned."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.registry import register
from lightning_prune.graph.channel_graph import ChannelGraph, Group, Snapshot, values_of

__all__ = ["group_magnitude"]

_TINY = np.finfo(float).tiny


@register("group_magnitude", blocks="none")
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
    scores = {name: np.full_like(kept, np.nan) for name, kept in norms.of_kept.items()}
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
    scores_of_kept = {name: torch.from_numpy(values) for name, values in scores.items()}
    return to_original_channels(graph, scores_of_kept)


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


@dataclass(frozen=True)
class _Crossing:
    """A place of a group, and the places that share weights with it.

    Attributes:
        squares: The squares of the tensor, zeros where a channel has been pruned.
        place: The place.
        across: Places along other axes of the same tensor.
        along: Places of other groups at the same positions of the same axis, as heads and their values have them.
    """

    squares: np.ndarray
    place: _Place
    across: list[_Place]
    along: list[_Place]


class _CoupledNorms:
    """The squared norms of all channels, over the matrices and filters that produce or consume them.

    Attributes:
        of_kept: (kept channels,) for each group, those that the model has now; ``inf`` for one that is pruned here.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        now = graph.snapshot()
        sizes = {name: len(now.kept(name)) for name in graph.groups}
        self.of_kept = {name: np.zeros(size) for name, size in sizes.items()}
        places = _places_by_tensor(now)
        squares = {}
        for name in places:
            squares[name] = _squares_along(places[name], values_of(now.tensors, name))
            for place in places[name]:
                self.of_kept[place.group] += _sums_of_channels(squares[name], place)
        self._crossings: defaultdict[str, list[_Crossing]] = defaultdict(list)  # by group
        for group in graph.groups.values():
            for name in _tensors_of(group, places):
                crossings = _crossings(group, squares[name], places[name])
                self._crossings[group.name].extend(crossings)

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
        for crossing in self._crossings[group]:
            place = crossing.place
            positions = place.positions[channel]
            pruned = crossing.squares.take(positions, place.axis)
            for other in crossing.across:
                self.of_kept[other.group] -= _sums_of_channels(pruned, other)
                changed.add(other.group)
            within = (slice(None),) * place.axis + (positions,)
            crossing.squares[within] = 0.0  # what two channels share is pruned once
            for other in crossing.along:
                alone = np.zeros_like(crossing.squares)
                alone[within] = pruned
                self.of_kept[other.group] -= _sums_of_channels(alone, other)
                changed.add(other.group)
        self.of_kept[group][channel] = np.inf
        return changed


def _places_by_tensor(now: Snapshot) -> dict[str, list[_Place]]:
    """Return where the channels of all groups lie in matrices and filters."""
    places: defaultdict[str, list[_Place]] = defaultdict(list)
    for name, group in now.groups.items():
        kept = now.kept(name)
        for where in dict.fromkeys(group.slices):  # queries are masked where they are produced, which counts once
            if now.tensors[where.tensor].dim() == 1:  # a bias, or a scale of normalisation
                continue
            positions = now.positions(where, kept).reshape(len(kept), -1)
            place = _Place(name, where.axis, positions.numpy())
            places[where.tensor].append(place)
    return places


def _tensors_of(group: Group, places: Collection[str]) -> list[str]:
    """Return the names of the matrices and filters that a group lies in, each once."""
    names = dict.fromkeys(where.tensor for where in group.slices)
    return [name for name in names if name in places]


def _crossings(group: Group, squares: np.ndarray, places: Sequence[_Place]) -> Iterator[_Crossing]:
    """Yield the places of a group in one tensor, with those that cross them."""
    for place in places:
        if place.group == group.name:
            across = [other for other in places if other.axis != place.axis]
            along = [other for other in places if _meet(place, other)]
            yield _Crossing(squares, place, across, along)


def _meet(place: _Place, other: _Place) -> bool:
    """Tell whether two groups have positions of one axis in common."""
    if other.group == place.group or other.axis != place.axis:
        return False
    return bool(np.isin(place.positions, other.positions).any())


def _squares_along(places: Sequence[_Place], tensor: Tensor) -> np.ndarray:
    """Return the squares of a tensor, summed over the axes along which there are no channels, which get length 1."""
    axes = {place.axis for place in places}
    weights = tensor.cpu()
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
