"""Criterion on what pruning a channel costs once the weights that are kept make up for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, flops_per_channel, to_original_channels
from lightning_prune.criteria.expected_shares import expected_shares
from lightning_prune.criteria.input_hooks import consumed_places, positions_of_channels
from lightning_prune.criteria.layer_sensitivity import Sensitivity, sensitivities
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

__all__ = ["coherent_obs"]

_RIDGE = 1e-3  # of the mean variance of the channels
_ENOUGH = 4  # samples for each channel
_MOST_SHRUNK = 0.9
_BLOCKS = 32  # a block is this share of the channels that are kept so far
_TINY = torch.finfo(torch.float64).tiny
_LEAST_FLOPS = 1e-12  # of the sum over groups
_POOL = 4  # channels that a block is chosen from, as a multiple of it


@register("coherent_obs")
def coherent_obs(graph: ChannelGraph, batches: Iterable[Any] | None = None, loss: Loss | None = None) -> Scores:
    """Score channels by the damage to the outputs when they are pruned one after the other and the others make up.

    Each time the channel goes whose pruning costs least, and what the layers behind it read is then read from the
    others, as well as it can be. The cost has two terms: errors that differ from position to position, and errors that
    are the same all over an image and add up under average pooling. Labels are not used.

    Without batches the cost of a channel is the share of the outputs of the layers behind it that is expected to come
    from it, by weights and batch normalisation alone; channels are taken as uncorrelated then. Groups that no
    convolution or linear layer is seen to consume are scored like that too, on the scale of the others.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data; some hundred samples in all are enough. None for scores without data.
        loss: Given the model and a batch, runs the model; what it returns is not used. Default: the batch is what the
            model is called with.

    Returns:
        (channels,) cost of each channel of each group for each FLOP that it takes, higher is kept; within a group never
        below that of a channel that is pruned before. ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If there is no batch in ``batches``.

    Note:
        Backward elimination with compensation is Optimal Brain Surgeon (Hassibi and Stork, 1993) on whole channels.
        Interpretations: the Hessian at a layer is that of the squared change of the outputs of the network, by random
        projections; the term of errors that add up is this package's own. Channels go in blocks of a thirty-second. Of
        fewer samples than four times the channels, the covariance is drawn to its mean variance: else others would seem
        to repeat a channel that happen to fit.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.randn(50, 2)
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> _ = model[2].weight.data.fill_(1.0)
        >>> coherent_obs(trace(model, x), [x])["0"].argmin().item()  # which another channel repeats, larger
        1
    """
    costs = expected_shares(graph)
    if batches is not None:
        seen = _costs_seen(graph, batches, loss)
        scale = _scale(costs, seen)
        for name, expected in costs.items():
            costs[name] = seen.get(name, scale * expected)
    flops = flops_per_channel(graph)
    scores = {}
    for name in graph.groups:
        per_channel = max(flops[name], _LEAST_FLOPS)
        scores[name] = costs[name] / per_channel
    return to_original_channels(graph, scores)


def _costs_seen(graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None) -> Scores:
    """Return the costs in the groups that layers were seen to consume: (kept channels,)."""
    found = sensitivities(graph, batches, loss, _places(graph))
    costs = {}
    for name in graph.groups:
        terms = _terms(graph, name, found)
        if terms:
            costs[name] = _costs_of_elimination(terms)
    return costs


def _scale(expected: Scores, seen: Scores) -> float:
    """Return what makes expected costs comparable with those seen: the quotient of their means over the same groups."""
    of_expected = 0.0
    of_seen = 0.0
    for name, costs in seen.items():
        of_seen += float(costs.mean())
        of_expected += float(expected[name].mean())
    if not of_seen > 0:  # nothing was seen, or nothing of worth
        return 1.0
    return of_seen / max(of_expected, _TINY)


@dataclass
class _Terms:
    """What the channels of a group cost at one layer that consumes them: matrices of (channels, channels).

    Attributes:
        inverse: Inverse covariance of the channels.
        varying: Sensitivity to errors that differ from position to position.
        uniform: Sensitivity to errors that are the same all over a sample.
        means: Covariance of the means over positions, between two of the inverse.
    """

    inverse: Tensor
    varying: Tensor
    uniform: Tensor
    means: Tensor

    @property
    def costs(self) -> Tensor:
        """(channels,) what each channel costs if it is pruned next."""
        inverse = self.inverse.diagonal()
        varying = self.varying.diagonal()
        uniform = self.uniform.diagonal()
        means = self.means.diagonal()
        varying = varying / inverse
        uniform = uniform * means
        uniform = uniform / inverse.square()
        return varying + uniform

    def of(self, channels: Tensor) -> "_Terms":
        """Return the terms of some channels alone, as long as none is pruned."""
        rows = channels[:, None]
        return self._each(lambda matrix: matrix[rows, channels])

    def without(self, pruned: Tensor, kept: Tensor) -> "_Terms":
        """Return the terms of the kept channels once others are pruned and compensated for.

        Args:
            pruned: (n,) int64.
            kept: (m,) int64.
        """
        rows = self.inverse[pruned]
        inner = rows[:, pruned]
        outer = rows[:, kept]
        shares = -torch.linalg.solve(inner, outer)  # of each pruned channel that goes to each kept one

        def joined(matrix: Tensor) -> Tensor:
            rows = matrix.index_select(0, kept)
            within = matrix[pruned]
            within = within[:, pruned]
            across = rows[:, pruned]
            half = shares.T @ within
            half = half / 2
            across = across + half
            change = across @ shares
            total = rows.index_select(1, kept)
            total += change
            total += change.T
            return total

        return self._each(joined)

    def drop(self, channel: int) -> None:
        """Prune one channel in place and compensate for it: nothing depends on its row and column any more."""
        row = self.inverse[channel]
        shares = -row / row[channel]  # that goes to each other channel, and all of it from itself
        for matrix in (self.inverse, self.varying, self.uniform, self.means):
            row = matrix[channel]
            half = shares * row[channel]
            half = half / 2
            across = row + half
            change = torch.outer(across, shares)
            matrix += change
            matrix += change.T

    def _each(self, change: Callable[[Tensor], Tensor]) -> "_Terms":
        return _Terms(
            inverse=change(self.inverse),
            varying=change(self.varying),
            uniform=change(self.uniform),
            means=change(self.means),
        )


def _places(graph: ChannelGraph) -> dict[str, dict[str, Tensor]]:
    """Return the (channels, positions of a channel) of groups in the weights that consume them, by weight and group."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, group in graph.groups.items():
        for tensor, slices in consumed_places(group).items():
            of_weight = places.setdefault(tensor, {})
            of_weight[name] = positions_of_channels(graph, name, slices)
    return places


def _terms(graph: ChannelGraph, group: str, found: Mapping[str, Sensitivity]) -> list[_Terms]:
    """Return the terms of a group at each layer that consumes it."""
    tensors = named_tensors(graph.model)
    terms = []
    for name, of_weight in _places(graph).items():
        layer = found.get(name)
        if group not in of_weight or layer is None or not layer.is_seen:
            continue
        positions = of_weight[group]
        weight = tensors[name].detach()
        weight = weight.movedim(layer.in_axis, 1)
        weight = weight[:, positions]
        at_layer = _terms_at(layer, group, weight.double())
        terms.append(at_layer)
    return terms


def _terms_at(layer: Sensitivity, group: str, weight: Tensor) -> _Terms:
    """Return the terms at one layer.

    Args:
        layer: What was seen there.
        group: Name of the group.
        weight: (out_channels, channels, positions of a channel, *taps).
    """
    covariance = layer.covariance(group)
    diagonal = covariance.diagonal()
    scale = diagonal.mean()
    scale = scale.clamp_min(_TINY)
    ridge = _RIDGE + _shrinkage(covariance, layer.count(group))
    diagonal.add_(ridge * scale)
    inverse = torch.linalg.inv(covariance)
    inverse = inverse + inverse.T
    inverse = inverse / 2
    means = layer.covariance_of_means(group)
    means = inverse @ means @ inverse
    if weight.shape[2] > 1:  # each position has a weight of its own: errors do not add up
        sensitivity = layer.varying + layer.uniform
        varying = _squared(weight, sensitivity)
        none = torch.zeros_like(varying)
        return _Terms(inverse, varying, none, means)
    varying = _squared(weight, layer.varying)
    taps = weight.flatten(2)
    summed = taps.sum(2, keepdim=True)
    uniform = _squared(summed, layer.uniform)
    return _Terms(inverse, varying, uniform, means)


def _shrinkage(covariance: Tensor, count: int) -> float:
    """Return the ridge that a covariance of few samples needs besides, as a share of the mean variance.

    Where there are hardly more samples than channels, every channel seems to be repeated by the others. The ridge is
    that of oracle approximating shrinkage (Chen et al., 2010), fading out until there are four samples for a channel.

    Args:
        covariance: (channels, channels).
        count: How many samples it is of, counting positions.
    """
    channels = len(covariance)
    lacking = 1 - count / (_ENOUGH * channels)
    if channels < 2 or lacking <= 0:
        return 0.0
    total = float(covariance.trace()) ** 2
    squares = float(covariance.square().sum())
    spread = squares - total / channels
    wanted = squares * (1 - 2 / channels) + total
    known = (count + 1 - 2 / channels) * spread
    share = min(_MOST_SHRUNK, wanted / max(known, _TINY))
    return lacking * share / (1 - share)


def _squared(weight: Tensor, sensitivity: Tensor) -> Tensor:
    """Return the products of channels over outputs and taps, weighted by outputs: (channels, channels)."""
    taps = weight.flatten(2)  # (out_channels, channels, taps)
    factor = sensitivity.sqrt()
    weighted = taps * factor[:, None, None]
    weighted = weighted.transpose(1, 2)
    rows = weighted.flatten(0, 1)
    return rows.T @ rows


def _costs_of_elimination(terms: list[_Terms]) -> Tensor:
    """Prune all channels of a group in the order of their costs: (channels,) the greatest cost up to each.

    Args:
        terms: The terms at each layer, which are changed.
    """
    size = len(terms[0].inverse)
    costs = torch.zeros(size, dtype=torch.float64)
    channels = torch.arange(size)  # that are kept so far
    greatest = 0.0
    while len(channels):
        block = max(1, len(channels) // _BLOCKS)
        total = _total(terms)
        cheapest_first = total.argsort(stable=True)
        pool = cheapest_first[: _POOL * block]
        in_pool = [one.of(pool) for one in terms]
        places, costs_of_block = _cheapest(in_pool, block)
        pruned = pool[places]
        numbers = channels[pruned]
        for channel, cost in zip(numbers.tolist(), costs_of_block, strict=True):
            greatest = max(greatest, cost)
            costs[channel] = greatest
        kept = _others(len(channels), pruned)
        for place, one in enumerate(terms):  # each makes room for the next
            terms[place] = one.without(pruned, kept)
        channels = channels[kept]
    return costs


def _cheapest(terms: Sequence[_Terms], number: int) -> tuple[list[int], list[float]]:
    """Return the places and costs of channels that go one after the other, each the cheapest by then.

    Args:
        terms: The terms, which are changed.
        number: How many go.
    """
    chosen: list[int] = []
    costs: list[float] = []
    for _ in range(number):
        total = _total(terms)
        total[chosen] = torch.inf
        place = int(total.argmin())
        chosen.append(place)
        costs.append(float(total[place]))
        for one in terms:
            one.drop(place)
    return chosen, costs


def _others(number: int, chosen: Tensor) -> Tensor:
    """Return those of a number of positions that are not among the chosen ones."""
    is_other = torch.ones(number, dtype=torch.bool)
    is_other[chosen] = False
    [others] = is_other.nonzero(as_tuple=True)
    return others


def _total(terms: Sequence[_Terms]) -> Tensor:
    """Return what each channel costs at all layers together if it is pruned next: (channels,)."""
    costs = [one.costs for one in terms]
    by_layer = torch.stack(costs)
    return by_layer.sum(0)
