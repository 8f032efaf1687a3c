"""Operators that take slices of an axis: the labels are sliced along."""

import torch

from lightning_prune.graph.rules.elementwise import same_shape
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []


@rule("aten.slice", "aten.narrow")
def take_slice(tracer: Tracer, call: Call) -> None:
    """Keep the channels of a slice. Those of a half, a third ... are tied to the rest, so that all keep equal size."""
    x, output = call.args[0], call.output
    dim = call.argument(1, "dim", 0)
    axis = dim % x.dim()
    labels = tracer.labels(x, axis)
    if labels is None or output.shape == x.shape:
        same_shape(tracer, call)
        return
    taken = _slice_like(call, labels)
    all_parts = tracer.parts_wanted * len(taken)
    tracer.splits = all_parts == len(labels)
    if len(taken) == 0:
        tracer.mark_unprunable(labels, "has none of its channels taken")
    elif _is_equal_chunk(labels, taken):
        tracer.tie_parts(labels, len(taken))
    output_labels = {**tracer.all_labels(x), axis: taken}
    tracer.set_labels(output, output_labels)


def _slice_like(call: Call, labels: Labels) -> Labels:
    """Take the slice of labels that the call takes of an axis."""
    start_stop_step = call.args[2:]
    named = dict(call.kwargs)
    named.pop("dim", None)
    return call.operator(labels, 0, *start_stop_step, **named)


def _is_equal_chunk(labels: Labels, taken: Labels) -> bool:
    """Tell whether a slice is all, a half, a third ... of the labels, without a gap."""
    size = len(taken)
    if len(labels) % size > 0:
        return False
    matches = labels == taken[0]
    start = int(matches.nonzero()[0, 0])
    return torch.equal(taken, labels[start : start + size])


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk")
def split(tracer: Tracer, call: Call) -> None:
    """Give every output the channels of its slice; slices of equal size are tied, so that they keep equal size."""
    x = call.args[0]
    dim = call.argument(2, "dim", 0)
    axis = dim % x.dim()
    labels = tracer.labels(x, axis)
    if labels is None:
        same_shape(tracer, call)
        return
    sizes = [output.shape[axis] for output in call.outputs]
    if len(set(sizes)) == 1:
        size = sizes[0]
        tracer.tie_parts(labels, size)
        tracer.splits = tracer.parts_wanted == len(sizes)
    tracer.splits = tracer.splits or tracer.where() in tracer.free_modules
    slices = labels.split(sizes)
    labels_by_axis = tracer.all_labels(x)
    for output, taken in zip(call.outputs, slices, strict=True):
        output_labels = {**labels_by_axis, axis: taken}
        tracer.set_labels(output, output_labels)


@rule("aten.glu")
def gated(tracer: Tracer, call: Call) -> None:
    """Tie the halves of the channels: one is multiplied by a function of the other."""
    x = call.args[0]
    dim = call.argument(1, "dim", -1)
    axis = dim % x.dim()
    labels_by_axis = dict(tracer.all_labels(x))
    labels = labels_by_axis.get(axis)
    if labels is not None:
        half = len(labels) // 2
        tracer.tie_parts(labels, half)
        tracer.splits = True
        labels_by_axis[axis] = labels[:half]
    tracer.set_labels(call.output, labels_by_axis)
