"""Criterion for layers, average filter information entropy: one number per group, for `plan_by_layer`."""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, Snapshot
from lightning_prune.graph.finite import REMEDY, not_finite_in
from lightning_prune.pruning_plan import Slice

__all__ = ["afie", "afie_of_shapes", "spectrum_entropy"]

Entropy = Callable[[Tensor], float]
"""Given a matrix (filters, inputs), returns the entropy of its singular values."""


def afie(graph: ChannelGraph, flatten: bool = False) -> dict[str, float]:
    """Return the average filter information entropy of each group; groups with less of it are pruned more.

    The entropy is that of the singular values of a layer's weights, brought to [0, 1] and put through a softmax; it is
    divided by the number of filters of the layer.

    Args:
        graph: The traced model; the weights are read as they are now.
        flatten: Read a filter as one row of inputs times positions, instead of averaging it over its positions.

    Returns:
        One number above 0 per group.

    Raises:
        ValueError: If a weight is not finite.

    Note:
        The measure is that of Lu et al., "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI
        2024), with weights averaged over positions; flattening is an option of this library. Interpretations: a group
        counts the mean of the layers that produce its channels; a layer whose matrix has a single singular value (one
        input, as in depthwise convolutions) has no entropy and does not count in the mean; a group of such layers alone
        counts the mean of the other groups. Equal values count as uniform. Since the values lie in [0, 1]
        before the softmax, the entropy of p of them is between ln p - 0.1234 and ln p whatever the weights are: the
        measure is nearly one of the shape alone, so compare with `afie_of_shapes`.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.zeros(1, 2))
        >>> _ = graph.model[0].weight.data.copy_(torch.eye(4, 2))  # two equal singular values: ln 2 / 4
        >>> round(afie(graph)["0"], 4)
        0.1733
    """
    tensors = graph.tensors()
    for name, group in graph.groups.items():
        for place in group.out_slices:
            found = not_finite_in(tensors[place.tensor])
            if found:
                raise ValueError(f"Group {name!r} has no entropy, as {place.tensor!r} holds {found}; {REMEDY}.")
    return _by_group(graph, flatten, spectrum_entropy)


def afie_of_shapes(graph: ChannelGraph, flatten: bool = False) -> dict[str, float]:
    """Return what `afie` can be at most, which takes the shapes of the layers alone: the control to compare it with.

    Args:
        graph: The traced model.
        flatten: As for `afie`.

    Returns:
        One number above 0 per group: the logarithm of the number of singular values, divided by that of filters.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.zeros(1, 2))
        >>> round(afie_of_shapes(graph)["0"], 4)  # ln 2 / 4
        0.1733
    """
    return _by_group(graph, flatten, _largest_entropy)


def spectrum_entropy(matrix: Tensor) -> float:
    """Return the entropy, in nats, of the softmax of the singular values brought to [0, 1].

    Args:
        matrix: (filters, inputs) weights.

    Example:
        >>> spectrum = torch.diag(torch.tensor([2.0, 1.0]))  # softmax of 1 and 0
        >>> round(spectrum_entropy(spectrum), 4)
        0.5822
    """
    precise = matrix.detach().to("cpu", torch.float64)
    values = torch.linalg.svdvals(precise)
    smallest, largest = values.min(), values.max()
    spread = largest - smallest
    logits = torch.zeros_like(values)
    if spread > largest * _rounding(matrix):
        logits = (values - smallest) / spread
    softmax = torch.distributions.Categorical(logits=logits)
    return float(softmax.entropy())


def _largest_entropy(matrix: Tensor) -> float:
    singular_values = min(matrix.shape)
    return math.log(singular_values)


def _rounding(matrix: Tensor) -> float:
    """Return what singular values may differ by for reasons of rounding, as a fraction of the largest one."""
    # By the step of float32 for half precision too: by that of its own, all singular values would be equal.
    steps = [torch.finfo(dtype).eps for dtype in (matrix.dtype, torch.float32)]
    return max(matrix.shape) * min(steps)


def _by_group(graph: ChannelGraph, flatten: bool, entropy: Entropy) -> dict[str, float]:
    """Return the mean of an entropy, per filter, over the layers that produce each group."""
    now = graph.snapshot()
    means: dict[str, float] = {}
    for name, group in graph.groups.items():
        entropies = []
        for place in group.out_slices:
            weight = now.tensors[place.tensor]
            matrix = _matrix(now, name, place, weight, flatten)
            if min(matrix.shape) > 1:
                entropies.append(entropy(matrix) / len(matrix))
        if entropies:
            means[name] = _mean(entropies)
    mean_of_groups = _mean(means.values()) if means else 1.0
    return {name: means.get(name, mean_of_groups) for name in graph.groups}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _matrix(now: Snapshot, group: str, place: Slice, weight: Tensor, flatten: bool) -> Tensor:
    """Return the weights of a layer that produce the channels of a group: (filters, inputs)."""
    kept = now.kept(group)
    positions = now.positions(place, kept)
    positions = positions.to(weight.device)
    filters = weight.detach().index_select(place.axis, positions)
    filters = filters.movedim(place.axis, 0)  # (filters, inputs, ...)
    if flatten or filters.dim() < 3:
        return filters.flatten(1)
    return filters.flatten(2).mean(2)
