"""Operators that pick positions by number: channels along an axis that is picked from are unprunable."""

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_prune.graph.rules.elementwise import same_shape
from lightning_prune.graph.rules.table import plain_name, rule
from lightning_prune.graph.sameness import same_along
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []


def _mark_picked(tracer: Tracer, call: Call, axes: Collection[int]) -> dict[int, Labels]:
    """Make the channels along some axes unprunable, and return the labels along the others."""
    x = call.args[0]
    why = f"has its channels picked by {plain_name(call)}"
    other_labels = {}
    for axis, labels in tracer.all_labels(x).items():
        if axis in axes:
            tracer.mark_unprunable(labels, why)
        else:
            other_labels[axis] = labels
    return other_labels


def _axis_argument(call: Call) -> int:
    x = call.args[0]
    dim = call.argument(1, "dim", 0)
    return dim % x.dim()


@rule("aten.select", "aten.unbind")
def select(tracer: Tracer, call: Call) -> None:
    """Keep the channels along all axes but the one that is picked from, which the output does not have."""
    picked_axis = _axis_argument(call)
    other_labels = _mark_picked(tracer, call, [picked_axis])
    output_labels = {}
    for axis, labels in other_labels.items():
        output_axis = axis - 1 if axis > picked_axis else axis
        output_labels[output_axis] = labels
    for output in call.outputs:
        tracer.set_labels(output, output_labels)


@rule("aten.index_select", "aten.unfold")
def index_select(tracer: Tracer, call: Call) -> None:
    """Keep the channels along all axes but the one that is picked from."""
    picked_axis = _axis_argument(call)
    other_labels = _mark_picked(tracer, call, [picked_axis])
    tracer.set_labels(call.output, other_labels)


@rule("aten.roll")
def roll(tracer: Tracer, call: Call) -> None:
    """Make channels unprunable along the axes that are rolled: all of them, as one long row, where none are named."""
    x = call.args[0]
    dims = call.argument(2, "dims") or range(x.dim())
    rolled = {axis % x.dim() for axis in dims}
    _mark_picked(tracer, call, rolled)
    same_shape(tracer, call)


@rule("aten.gather")
def gather(tracer: Tracer, call: Call) -> None:
    """Make the channels along every axis unprunable."""
    x = call.args[0]
    _mark_picked(tracer, call, range(x.dim()))


@rule("aten.index")
def index(tracer: Tracer, call: Call) -> None:
    """Keep the channels in front of and behind indexed axes that are neighbours; all others are unprunable."""
    x, indices = call.args[:2]
    output = call.output
    indexed = _indexed_axes(indices)
    other_labels = _mark_picked(tracer, call, indexed)
    first, last = min(indexed), max(indexed)
    are_neighbours = len(indexed) == last - first + 1
    added_axes = output.dim() - x.dim()
    output_labels = {}
    for axis, labels in other_labels.items():
        if not are_neighbours:
            tracer.mark_unprunable(labels, "is indexed along several axes")
        elif axis < first:
            output_labels[axis] = labels
        else:
            output_labels[axis + added_axes] = labels
    tracer.set_labels(output, output_labels)


@rule("aten.index_put", "aten.index_put_")
def index_put(tracer: Tracer, call: Call) -> None:
    """Tie the channels behind the axes that values are put into by number; all others are unprunable."""
    x, indices, values = call.args[:3]
    first_behind = max(_indexed_axes(indices)) + 1
    picked = range(first_behind)
    output_labels = _mark_picked(tracer, call, picked)
    labels_of_values = dict(tracer.all_labels(values))
    for axis in range(first_behind, x.dim()):
        values_axis = axis - x.dim() + values.dim()
        labels_of_values.pop(values_axis, None)
        if values_axis >= 0 and values.shape[values_axis] == x.shape[axis]:
            labels = tracer.tie_axes(x, axis, values, values_axis, "is put into a tensor of fixed size")
            if labels is not None:
                output_labels[axis] = labels
    for labels in labels_of_values.values():
        tracer.mark_unprunable(labels, f"has its channels picked by {plain_name(call)}")
    tracer.set_labels(call.output, output_labels)


def _indexed_axes(indices: list[Tensor | None]) -> set[int]:
    """Return the axes that are indexed; a mask is over as many as it has itself."""
    indexed: set[int] = set()
    axis = 0
    for positions in indices:
        if positions is None:
            axis += 1
            continue
        is_mask = positions.dtype in (torch.bool, torch.uint8)
        axes = positions.dim() if is_mask else 1
        indexed.update(range(axis, axis + axes))
        axis += axes
    return indexed


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(tracer: Tracer, call: Call) -> None:
    """Keep the channels of (batch, channels, height, width), of which regions are pooled: (regions, channels, ...)."""
    other_labels = _mark_picked(tracer, call, [0, 2, 3])
    for output in call.outputs[:1]:
        tracer.set_labels(output, other_labels)


@rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_")
def index_add(tracer: Tracer, call: Call) -> None:
    """Tie the channels of both tensors along all axes but the one along which the second is added by number."""
    x = call.args[0]
    numbered_axis = _axis_argument(call)
    source = call.argument(3, "source")
    output_labels = _mark_picked(tracer, call, [numbered_axis])
    for axis, labels in tracer.all_labels(source).items():
        if axis == numbered_axis:
            tracer.mark_unprunable(labels, f"has its channels picked by {plain_name(call)}")
        elif axis in output_labels or axis not in same_along(x):
            tracer.tie(output_labels.get(axis), labels, "is added to a tensor of fixed size")
        output_labels.setdefault(axis, labels)
    output_labels.pop(numbered_axis, None)
    for axis, labels in output_labels.items():
        if axis not in tracer.all_labels(source) and axis not in same_along(source):
            tracer.mark_unprunable(labels, "has a tensor of fixed size added")
    tracer.set_labels(call.output, output_labels)


@rule("aten._pack_padded_sequence")
def pack(tracer: Tracer, call: Call) -> None:
    """Keep the channels of padded sequences, (sequences, positions, *channels), that are packed into one row."""
    other_labels = _mark_picked(tracer, call, [0, 1])
    packed, sequences_by_position = call.outputs
    output_labels = {axis - 1: labels for axis, labels in other_labels.items()}
    tracer.set_labels(packed, output_labels)
    tracer.set_of_inputs(sequences_by_position)
