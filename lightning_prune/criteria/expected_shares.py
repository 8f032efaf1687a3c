"""What pruning a channel costs as far as weights and normalisation tell, without data."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.graph.channel_graph import ChannelGraph, Snapshot, values_of

__all__ = ["expected_shares", "names_of_scales"]

_TINY = torch.finfo(torch.float64).tiny


def expected_shares(graph: ChannelGraph) -> dict[str, Tensor]:
    """Return the share of the outputs of all layers behind a channel that is expected to come from it.

    What layers consume is taken as uncorrelated, with the variance that batch normalisation gives it; where there is
    none, with that of the layer's outputs for uncorrelated inputs. At each layer, the share of the variance is averaged
    over the outputs; shares of several layers are added. Where no layer consumes a group, its channels share what the
    group has in all: what is multiplied, as queries by keys are, by the product of both variances.

    Args:
        graph: The traced model; the weights are read as they are now.

    Returns:
        (kept channels,) float64 of each group, on the CPU.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, 1.0]]))
        >>> expected_shares(trace(model, torch.zeros(1, 1)))["0"]  # 4 * 1 and 1 * 4
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    now = graph.snapshot()
    scales = names_of_scales(graph.model)
    variances = {}
    for name in graph.groups:
        variances[name] = _variance(now, name, scales)
    shares: defaultdict[str, list[Tensor]] = defaultdict(list)
    consumed = _consumed(now)
    for (tensor, axis), places in consumed.items():
        squares = _squares(now, tensor, axis)
        at_layer = _shares_of_inputs(squares, places, variances)
        for place in places:
            by_position = at_layer[place.positions]
            of_group = by_position.sum(1)
            shares[place.group].append(of_group)
    added = {}
    for name, variance in variances.items():
        if name in shares:
            by_layer = torch.stack(shares[name])
            added[name] = by_layer.sum(0)
        else:
            added[name] = _shares_where_made(variance)
    return added


def _shares_where_made(variance: Tensor) -> Tensor:
    """Return the shares of the channels in what their group has in all, where no layer consumes it: (channels,)."""
    total = variance.sum()
    if total > 0:
        return variance / total
    alike = torch.ones_like(variance)
    return alike / len(alike)


def names_of_scales(model: nn.Module) -> set[str]:
    """Return the names of the scales of batch normalisation."""
    modules = model.named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, _BatchNorm)}


@dataclass(frozen=True)
class _Place:
    """Where the channels of a group lie along an axis of a weight that consumes them.

    Attributes:
        group: The group.
        positions: (channels, positions of a channel).
    """

    group: str
    positions: Tensor


def _variance(now: Snapshot, name: str, scales: set[str]) -> Tensor:
    """Return the expected variance of the channels of a group: (kept channels,)."""
    group = now.groups[name]
    normalised = [place for place in group.other_slices if place.tensor in scales]
    by_place = []
    for place in normalised or group.out_slices:
        rows = now.rows(name, place)
        rows = rows.detach()
        rows = rows.to("cpu", torch.float64)
        squares = rows.square()
        variance = squares.mean(1) if normalised else squares.sum(1)
        by_place.append(variance)
    variances = torch.stack(by_place)
    if group.kind == "query-key" and len(by_place) % 2 == 0:  # of each head: queries come first, then keys
        queries, keys = variances.chunk(2)
        variances = queries * keys
    return variances.sum(0)


def _consumed(now: Snapshot) -> dict[tuple[str, int], list[_Place]]:
    """Return which groups lie where, by the name and axis of the weights that consume them."""
    consumed = defaultdict(list)
    for name, group in now.groups.items():
        channels = now.kept(name)
        for one in group.consuming:
            along = one.tensor, one.axis
            positions = now.positions(one, channels)
            positions = positions.view(len(channels), -1)
            place = _Place(name, positions)
            consumed[along].append(place)
    return consumed


def _squares(now: Snapshot, name: str, axis: int) -> Tensor:
    """Return the squares of a weight, summed over its taps: (inputs, outputs)."""
    weight = values_of(now.tensors, name)
    weight = weight.detach()
    weight = weight.movedim(axis, 0)
    weight = weight.to("cpu", torch.float64)
    squares = weight.square()
    if squares.dim() == 1:
        return squares[:, None]
    if squares.dim() == 2:
        return squares
    taps = squares.flatten(2)
    return taps.sum(2)


def _shares_of_inputs(squares: Tensor, places: Sequence[_Place], variances: Mapping[str, Tensor]) -> Tensor:
    """Return the share of each input of what a layer is expected to return, the mean over outputs: (inputs,).

    Args:
        squares: (inputs, outputs) squared weights of the layer.
        places: Where groups lie along the inputs; others cannot be pruned, and are taken as varying like these.
        variances: (channels,) of each group.
    """
    known = []
    for place in places:
        of_group = variances[place.group]
        known.append(of_group)
    variance = torch.cat(known)
    variance = variance.mean()
    variance = variance.repeat(len(squares))
    for place, of_group in zip(places, known, strict=True):
        of_group = of_group[:, None]
        variance[place.positions] = of_group.expand_as(place.positions)
    variance = variance[:, None]
    expected = squares * variance
    total = expected.sum(0)
    total = total.clamp_min(_TINY)
    shares = expected / total
    return shares.mean(1)
