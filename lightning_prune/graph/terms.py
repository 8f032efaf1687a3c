"""Terms of the cost of a model: sums of products of axis lengths, by metric."""

from collections.abc import Sequence

import torch

from lightning_prune.graph.channel_graph import Axis, Term
from lightning_prune.graph.groups import Grouping
from lightning_prune.graph.records import CostTerm
from lightning_prune.graph.run import Forward

__all__ = ["cost_terms"]


def cost_terms(forward: Forward, grouping: Grouping, operations: Sequence[CostTerm]) -> dict[str, list[Term]]:
    """Return what a model costs.

    Args:
        forward: The forward pass of the model.
        grouping: Its groups.
        operations: Its operations, in evaluation mode.

    Returns:
        The terms of "flops", "params" and "channels".
    """
    by_metric = {
        "flops": operations,
        "params": _parameters(forward),
        "channels": _channels(forward, grouping),
    }
    known_axes: dict[int, Axis] = {}
    return {metric: [grouping.term(cost, known_axes) for cost in costs] for metric, costs in by_metric.items()}


def _parameters(forward: Forward) -> list[CostTerm]:
    counted = {id(parameter) for parameter in forward.submodule.parameters()}
    return [_size(forward, name) for name, tensor in forward.tensors.items() if id(tensor) in counted]


def _size(forward: Forward, name: str) -> CostTerm:
    """Return the number of elements of a parameter."""
    labels = forward.labelled.labels(name)
    fixed_sizes = [size for axis, size in enumerate(forward.shapes[name]) if axis not in labels]
    return CostTerm(torch.Size(fixed_sizes).numel(), tuple(labels.values()), _module(name))


def _channels(forward: Forward, grouping: Grouping) -> list[CostTerm]:
    """Count every axis of a weight along which channels of groups are produced."""
    slices = [slice_ for group in grouping.groups.values() for slice_ in group.out_slices]
    axes = dict.fromkeys((slice_.tensor, slice_.axis) for slice_ in slices)  # each once, in order
    return [CostTerm(1, (forward.labelled.labels(tensor)[axis],), _module(tensor)) for tensor, axis in axes]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
