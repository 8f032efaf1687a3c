"""Rank layers by average filter information entropy: one number per group, for `plan_by_layer`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, Slice
from lightning_prune.graph.substitution import named_tensors

__all__ = ["afie", "afie_of_shapes", "spectrum_entropy"]


def afie(graph: ChannelGraph, flatten: bool = False) -> dict[str, float]:
    """Return the average filter information entropy of each group; groups with less of it lose more.

    The entropy is that of the singular values of a layer's weights, brought to [0, 1] and put through a softmax; it is
    divided by the number of filters of the layer.

    Args:
        graph: The traced model; the weights are read as they are now.
        flatten: Read a filter as one row of inputs times positions, instead of averaging it over its positions.

    Returns:
        One number above 0 per group.

    Note:
        The measure is that of Lu et al., "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI
        2024), with weights averaged over positions; flattening is an option of this library. Interpretations: a group
        counts the mean of the layers that make its channels; a layer whose matrix has a single singular value (one
        input, as in depthwise convolutions) has no entropy and is left out of the mean; a group of such layers alone
        counts the mean of the other groups. Values that are all equal count as uniform. Since the values lie in [0, 1]
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
    return _by_group(graph, flatten, lambda matrix: math.log(min(matrix.shape)))


def spectrum_entropy(matrix: Tensor) -> float:
    """Return the entropy, in nats, of the softmax of the singular values brought to [0, 1].

    Args:
        matrix: (filters, inputs) weights.

    Example:
        >>> spectrum = torch.diag(torch.tensor([2.0, 1.0]))  # softmax of 1 and 0
        >>> round(spectrum_entropy(spectrum), 4)
        0.5822
    """
    values = torch.linalg.svdvals(matrix.detach().to("cpu", torch.float64))
    spread = values.max() - values.min()
    # By the step of float32 for half precision too: by that of its own, all singular values would be equal.
    step = min(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = values.max() * max(matrix.shape) * step
    scaled = (values - values.min()) / spread if spread > rounding else torch.zeros_like(values)
    return float(torch.distributions.Categorical(logits=scaled).entropy())


def _by_group(graph: ChannelGraph, flatten: bool, entropy: Callable[[Tensor], float]) -> dict[str, float]:
    tensors = named_tensors(graph.model)
    found = {}
    for name, group in graph.groups.items():
        matrices = [_matrix(graph, name, part, tensors[part.tensor], flatten) for part in group.out_slices]
        each = [entropy(matrix) / len(matrix) for matrix in matrices if min(matrix.shape) > 1]
        if each:
            found[name] = sum(each) / len(each)
    mean = sum(found.values()) / len(found) if found else 1.0
    return {name: found.get(name, mean) for name in graph.groups}


def _matrix(graph: ChannelGraph, name: str, part: Slice, weight: Tensor, flatten: bool) -> Tensor:
    """Return the weights of a layer that make the channels of a group: (filters, inputs)."""
    positions = graph.positions_now(part, graph.kept(name)).to(weight.device)
    filters = weight.detach().index_select(part.axis, positions).movedim(part.axis, 0)
    if flatten or filters.dim() < 3:
        return filters.flatten(1)
    return filters.flatten(2).mean(2)
