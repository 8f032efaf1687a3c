"""Operators that join tensors or add positions to them: their labels are put side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.sameness import same_along
from lightning_prune.graph.tracer import FIXED, Call, Labels, Tracer

__all__: list[str] = []


@rule("aten.cat", "aten.concat")
def concatenate(tracer: Tracer, call: Call) -> None:
    """Put the channels of tensors side by side along one axis, and tie them along the others."""
    dimensions = call.output.dim()
    tensors = [tensor for tensor in call.args[0] if tensor.dim() == dimensions]  # empty ones may have a single axis
    dim = call.argument(1, "dim", 0)
    joined_axis = dim % dimensions
    output_labels: dict[int, Labels] = {}
    if _any_has_labels(tracer, tensors, joined_axis):
        side_by_side = [_labels_or_fixed(tracer, tensor, joined_axis) for tensor in tensors]
        output_labels[joined_axis] = torch.cat(side_by_side)
    for axis in range(dimensions):
        if axis == joined_axis:
            continue
        if _any_has_labels(tracer, tensors, axis):
            output_labels[axis] = _tie_along(tracer, tensors, axis)
    tracer.set_labels(call.output, output_labels)


@rule("aten.stack")
def stack(tracer: Tracer, call: Call) -> None:
    """Tie the channels of tensors that are stacked along a new axis."""
    tensors, output = call.args[0], call.output
    dim = call.argument(1, "dim", 0)
    new_axis = dim % output.dim()
    old_axes = list(range(output.dim()))
    old_axes.remove(new_axis)
    output_labels = {}
    for axis, output_axis in enumerate(old_axes):
        if _any_has_labels(tracer, tensors, axis):
            output_labels[output_axis] = _tie_along(tracer, tensors, axis)
    tracer.set_labels(output, output_labels)


def _any_has_labels(tracer: Tracer, tensors: Sequence[Tensor], axis: int) -> bool:
    return any(axis in tracer.all_labels(tensor) for tensor in tensors)


def _labels_or_fixed(tracer: Tracer, tensor: Tensor, axis: int) -> Labels:
    labels = tracer.labels(tensor, axis)
    if labels is not None:
        return labels
    size = tensor.shape[axis]
    return torch.full((size,), FIXED)


def _tie_along(tracer: Tracer, tensors: Sequence[Tensor], axis: int) -> Labels:
    """Tie the labels of tensors along an axis that they share, and return those of the first that has any."""
    different = [tensor for tensor in tensors if not _is_same_along(tracer, tensor, axis)]
    labels_of_each = [tracer.labels(tensor, axis) for tensor in different]
    shared = next(labels for labels in labels_of_each if labels is not None)
    for labels in labels_of_each:
        tracer.tie(shared, labels, "is put beside a tensor of fixed size")
    return shared


def _is_same_along(tracer: Tracer, tensor: Tensor, axis: int) -> bool:
    return tracer.labels(tensor, axis) is None and axis in same_along(tensor)


@rule("aten.constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> None:
    """Keep the channels, and put positions that cannot be pruned before and behind them where their axis is padded."""
    x, amounts = call.args[:2]
    output_labels = dict(tracer.all_labels(x))
    axis = x.dim()
    for before, behind in zip(amounts[::2], amounts[1::2], strict=True):  # the last axis comes first
        axis -= 1
        labels = output_labels.get(axis)
        if labels is not None:
            output_labels[axis] = torch.constant_pad_nd(labels, [before, behind], FIXED)
    tracer.set_labels(call.output, output_labels)
