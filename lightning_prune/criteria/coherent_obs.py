"""Criterion on what pruning a channel costs once the weights that are kept make up for it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.criteria.channel_scores import Scores, flops_per_channel, to_original_channels
from lightning_prune.criteria.layer_sensitivity import Sensitivity, sensitivities
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors

__all__ = ["coherent_obs"]

_RIDGE = 1e-3  # of the mean variance of the channels
_BLOCKS = 32  # a block is this share of the channels that are kept so far
_POOL = 4  # channels that a block is chosen from, as a multiple of it


@register("coherent_obs")
def coherent_obs(graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None = None) -> Scores:
    """Score channels by the damage to the outputs when they are pruned one after the other and the others make up.

    Each time the channel goes whose pruning costs least, and what the layers behind it read is then read from the
    others, as well as it can be. The cost has two terms: errors that differ from position to position, and errors that
    are the same all over an image and add up under average pooling. Labels are not used.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data; some hundred samples in all are enough.
        loss: Given the model and a batch, runs the model; what it returns is not used. Default: the batch is what the
            model is called with.

    Returns:
        (channels,) cost of each channel of each group for each FLOP that it takes, higher is kept; within a group never
        below that of a channel that is pruned before. ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If there is no batch, or nothing is seen that consumes a group.

    Note:
        Backward elimination with compensation is Optimal Brain Surgeon (Hassibi and Stork, 1993) on whole channels.
        Interpretations: the Hessian at a layer is that of the squared change of the outputs of the network, by random
        projections; the term of errors that add up is this package's own. Channels go in blocks of a thirty-second.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.randn(50, 2)
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> coherent_obs(trace(model, x), [x])["0"].argmax().item()  # the others repeat each other
        0
    """
    found = sensitivities(graph, batches, loss, _places(graph))
    flops = flops_per_channel(graph)
    scores = {}
    for name in graph.groups:
        costs = _costs_of_elimination(_terms(graph, name, found))
        scores[name] = costs / max(flops[name], torch.finfo(costs.dtype).tiny)
    return to_original_channels(graph, scores)


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
        varying = self.varying.diagonal() / inverse
        uniform = self.uniform.diagonal() * self.means.diagonal() / inverse.square()
        return varying + uniform

    def of(self, channels: Tensor) -> "_Terms":
        """Return the terms of some channels alone, as long as none is pruned."""
        every = (self.inverse, self.varying, self.uniform, self.means)
        return _Terms(*(matrix[channels[:, None], channels] for matrix in every))

    def without(self, pruned: Tensor, kept: Tensor) -> "_Terms":
        """Return the terms of the kept channels once others are pruned and compensated for.

        Args:
            pruned: (n,) int64.
            kept: (m,) int64.
        """
        inner = self.inverse[pruned[:, None], pruned]
        outer = self.inverse[pruned[:, None], kept]
        shares = -torch.linalg.solve(inner, outer)  # of each pruned channel that goes to each kept one

        def joined(matrix: Tensor) -> Tensor:
            across = matrix[kept[:, None], pruned] @ shares
            within = shares.T @ matrix[pruned[:, None], pruned] @ shares
            return matrix[kept[:, None], kept] + across + across.T + within

        return _Terms(joined(self.inverse), joined(self.varying), joined(self.uniform), joined(self.means))


def _places(graph: ChannelGraph) -> dict[str, dict[str, Tensor]]:
    """Return the (channels, positions of a channel) of groups in the weights that consume them, by weight and group."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, group in graph.groups.items():
        channels = graph.kept(name)
        for one in group.in_slices:
            positions = graph.positions_now(one, channels).view(len(channels), -1)
            of_weight = places.setdefault(one.tensor, {})
            before = [of_weight[name]] if name in of_weight else []
            of_weight[name] = torch.cat([*before, positions], 1)
    return places


def _terms(graph: ChannelGraph, group: str, found: Mapping[str, Sensitivity]) -> list[_Terms]:
    """Return the terms of a group at each layer that consumes it."""
    tensors = named_tensors(graph.model)
    terms = []
    for name, of_weight in _places(graph).items():
        if group in of_weight and name in found:
            weight = tensors[name].detach().movedim(found[name].in_axis, 1).double()
            terms.append(_terms_at(found[name], group, weight[:, of_weight[group]]))
    if not terms:
        raise ValueError(
            f"Nothing that consumes group {group!r} is a convolution or linear layer that was run on the batches; "
            f"add {group!r} to ignore, or use a criterion that needs no activations, such as 'l1'."
        )
    return terms


def _terms_at(layer: Sensitivity, group: str, weight: Tensor) -> _Terms:
    """Return the terms at one layer.

    Args:
        layer: What was seen there.
        group: Name of the group.
        weight: (out_channels, channels, positions of a channel, *taps).
    """
    covariance = layer.covariance(group)
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    regular = covariance.clone()
    regular.diagonal().add_(_RIDGE * scale)
    inverse = torch.linalg.inv(regular)
    inverse = (inverse + inverse.T) / 2
    means = inverse @ layer.covariance_of_means(group) @ inverse
    if weight.shape[2] > 1:  # each position has a weight of its own: errors do not add up
        varying = _squared(weight, layer.varying + layer.uniform)
        return _Terms(inverse, varying, torch.zeros_like(varying), means)
    summed = weight.flatten(2).sum(2, keepdim=True)
    return _Terms(inverse, _squared(weight, layer.varying), _squared(summed, layer.uniform), means)


def _squared(weight: Tensor, sensitivity: Tensor) -> Tensor:
    """Return the products of channels over outputs and taps, weighted by outputs: (channels, channels)."""
    rows = weight.flatten(2).transpose(1, 2)  # (out_channels, taps, channels)
    weighted = rows * sensitivity.sqrt()[:, None, None]
    flat = weighted.flatten(0, 1)
    return flat.T @ flat


def _costs_of_elimination(terms: list[_Terms]) -> Tensor:
    """Prune all channels of a group in the order of their costs: (channels,) the greatest cost up to each."""
    size = len(terms[0].inverse)
    costs = torch.zeros(size, dtype=torch.float64)
    channels = torch.arange(size)  # that are kept so far
    greatest = 0.0
    while len(channels):
        block = max(1, len(channels) // _BLOCKS)
        total = torch.stack([one.costs for one in terms]).sum(0)
        pool = total.argsort(stable=True)[: _POOL * block]
        chosen = []
        for place, cost in _cheapest([one.of(pool) for one in terms], block):
            greatest = max(greatest, cost)
            costs[channels[pool[place]]] = greatest
            chosen.append(int(pool[place]))
        pruned = torch.tensor(chosen)
        is_kept = torch.ones(len(channels), dtype=torch.bool)
        is_kept[pruned] = False
        kept = is_kept.nonzero()[:, 0]
        terms = [one.without(pruned, kept) for one in terms]
        channels = channels[kept]
    return costs


def _cheapest(terms: Sequence[_Terms], number: int) -> list[tuple[int, float]]:
    """Return the places and costs of channels that go one after the other, each the cheapest by then."""
    chosen: list[tuple[int, float]] = []
    places = torch.arange(len(terms[0].inverse))
    for _ in range(number):
        total = torch.stack([one.costs for one in terms]).sum(0)
        cheapest = int(total.argmin())
        chosen.append((int(places[cheapest]), float(total[cheapest])))
        others = torch.cat([torch.arange(cheapest), torch.arange(cheapest + 1, len(places))])
        terms = [one.without(torch.tensor([cheapest]), others) for one in terms]
        places = places[others]
    return chosen
