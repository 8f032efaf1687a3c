"""Operators that repeat, permute or reshape: the labels move as the values do.

Labels along one axis are *spread* over the shape of their tensor, moved as the operator moves values, and then found
again along an axis of the output.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.records import Sheet
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__ = ["TWO_KINDS"]

_PICKED_OUT = "has one of its channels picked out"
TWO_KINDS = "has two kinds of channels along one axis"


class _LabelledAxis(NamedTuple):
    """An axis, and the labels along it."""

    axis: int
    labels: Labels


def _spread(labels: Labels, axis: int, shape: Sequence[int]) -> Tensor:
    """Expand the labels along one axis to the shape of a tensor, without memory."""
    shape_of_axis = [1] * len(shape)
    shape_of_axis[axis] = -1
    return labels.view(shape_of_axis).expand(shape)


def _varying_axes(spread: Tensor) -> list[int]:
    """Return the axes along which labels differ."""
    in_memory = spread
    for axis, stride in enumerate(spread.stride()):
        if stride == 0 and spread.shape[axis] > 1:  # the same labels all along the axis
            in_memory = in_memory.narrow(axis, 0, 1)
    return [axis for axis in range(in_memory.dim()) if _varies(in_memory, axis)]


def _varies(spread: Tensor, axis: int) -> bool:
    if spread.shape[axis] < 2:
        return False
    is_first = spread == spread.narrow(axis, 0, 1)
    return not bool(is_first.all())


def _labels_along(spread: Tensor, axis: int) -> Labels:
    """Return the labels along one axis, at the first position of all other axes."""
    position: list[int | slice] = [0] * spread.dim()
    position[axis] = slice(None)
    return spread[tuple(position)].contiguous()


def _find_axis(tracer: Tracer, spread: Tensor, written: Sequence[int] = ()) -> _LabelledAxis | None:
    """Find the axis that has the labels, after a move; None where they are along no axis.

    Where channels were split into several axes, such as (heads, width of a head), one axis keeps its number of
    positions and the other becomes shorter: channels at equal positions along the shorter one are tied.
    """
    varying = _varying_axes(spread)
    if not varying:
        one_label = spread.reshape(-1)[:1]
        if len(one_label) > 0:
            tracer.mark_unprunable(one_label, _PICKED_OUT)
        return None
    axis = varying[0]
    if len(varying) > 1:
        written = [written[axis] for axis in varying] if written else ()
        sizes = [spread.shape[axis] for axis in varying]
        shorter = tracer.split_axis(spread.reshape(-1), sizes, written)
        axis = varying[shorter]
    labels = _labels_along(spread, axis)
    if len(varying) > 1:
        split_labels = spread.reshape(-1)
        shorter_labels = _spread(labels, axis, spread.shape).reshape(-1)
        tracer.tie(split_labels, shorter_labels, "is split into parts")
    return _LabelledAxis(axis, labels)


def _add_labels(tracer: Tracer, output: Tensor, found: _LabelledAxis) -> None:
    """Label one more axis of an output; one that two kinds of channels share gets the labels that are followed."""
    output_labels = dict(tracer.all_labels(output))
    outer = output_labels.pop(found.axis, None)
    if outer is None:
        output_labels[found.axis] = found.labels
        tracer.set_labels(output, output_labels)
        return
    if tracer.known.sheet is Sheet.WIDTHS:
        output_labels[found.axis] = found.labels
    else:
        tracer.mark_unprunable(found.labels, TWO_KINDS)
    if tracer.known.sheet is Sheet.HEADS:
        output_labels[found.axis] = outer
    else:
        tracer.mark_unprunable(outer, TWO_KINDS)
    tracer.set_labels(output, output_labels)


# -- repeating ---------------------------------------------------------------------------------------------------------


@rule("aten.expand", "aten.repeat", "aten.flip", "aten.tile", "aten.repeat_interleave")
def repeat(tracer: Tracer, call: Call) -> None:
    """Repeat or reverse channels: the operator is called on their labels."""
    x, *other_arguments = call.args
    labels_by_axis = tracer.all_labels(x)
    for axis, labels in labels_by_axis.items():
        spread = _spread(labels, axis, x.shape)
        moved = call.operator(spread, *other_arguments, **call.kwargs)
        found = _find_axis(tracer, moved)
        if found is not None:
            _add_labels(tracer, call.output, found)


# -- permuting ---------------------------------------------------------------------------------------------------------

_FIRST_STRIDE = 1000  # more than any tensor has axes


@rule(
    "aten.permute", "aten.transpose", "aten.transpose_", "aten.t", "aten.t_", "aten.numpy_T", "aten.movedim",
    "aten.squeeze", "aten.unsqueeze",
)  # fmt: skip
def permute(tracer: Tracer, call: Call) -> None:
    """Label each axis of the output as the axis of the input that it was; one that is squeezed away is unprunable."""
    x = call.args[0]
    output_axis_of = _output_axes(call)
    squeezable = _squeezable_axes(call)
    output_labels = {}
    labels_by_axis = tracer.all_labels(x)
    for axis, labels in labels_by_axis.items():
        if axis in squeezable:
            tracer.require_two(labels)
        if axis in output_axis_of:
            output_axis = output_axis_of[axis]
            output_labels[output_axis] = labels
        else:
            tracer.mark_unprunable(labels, _PICKED_OUT)
    tracer.set_labels(call.output, output_labels)


def _output_axes(call: Call) -> dict[int, int]:
    """Return which axis of the output each axis of the input becomes; one that is squeezed away is absent.

    The operator runs on an empty tensor whose strides tell its axes apart.
    """
    x, *other_arguments = call.args
    sizes = [2 if size > 1 else 1 for size in x.shape]
    strides = [_FIRST_STRIDE + axis for axis in range(x.dim())]
    numbered = torch.empty_strided(sizes, strides, device="meta")
    moved = call.operator(numbered, *other_arguments, **call.kwargs)
    output_axis_of = {}
    for output_axis, stride in enumerate(moved.stride()):
        if stride in strides:
            axis = stride - _FIRST_STRIDE
            output_axis_of[axis] = output_axis
    return output_axis_of


def _squeezable_axes(call: Call) -> set[int]:
    """Return the axes that would be squeezed away if they had a single position."""
    if call.name != "aten.squeeze":
        return set()
    dimensions = call.args[0].dim()
    axes = call.argument(1, "dim", range(dimensions))
    if isinstance(axes, int):
        axes = [axes]
    return {axis % dimensions for axis in axes}


# -- reshaping ---------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """Neighbouring axes of an input that become neighbouring axes of the output when it is reshaped.

    Attributes:
        axes: The axes of the input.
        output_axes: The axes of the output; the product of their sizes is the same.
    """

    axes: list[int]
    output_axes: list[int]


@rule("aten.view", "aten._unsafe_view", "aten.reshape")
def reshape(tracer: Tracer, call: Call) -> None:
    """Merge or split axes: channels that are merged with other axes lie in blocks, those that are split are tied."""
    x, output = call.args[0], call.output
    for block in _blocks(x.shape, output.shape):
        for axis in block.axes:
            found = _through_block(tracer, x, axis, block, output)
            if found is not None:
                _add_labels(tracer, output, found)
    written = tracer.written_sizes(output)
    for axis, labels in tracer.all_labels(output).items():
        tracer.require_same_width(labels, [written[axis]])


def _through_block(tracer: Tracer, x: Tensor, axis: int, block: _Block, output: Tensor) -> _LabelledAxis | None:
    """Find the axis of the output that has the labels of an axis of the input, if that has any."""
    labels = tracer.labels(x, axis)
    if labels is None:
        return None
    first_output_axis = block.output_axes[0]
    all_written = tracer.written_sizes(output)
    written = [all_written[other] for other in block.output_axes]
    tracer.require_same_width(labels, written)
    if len(block.axes) == len(block.output_axes) == 1:
        return _LabelledAxis(first_output_axis, labels)
    sizes = [x.shape[other] for other in block.axes]
    output_sizes = [output.shape[other] for other in block.output_axes]
    axis_in_block = block.axes.index(axis)
    spread = _spread(labels, axis_in_block, sizes)
    reshaped = spread.reshape(output_sizes)
    found = _find_reshaped_axis(tracer, reshaped, written)
    if found is None:
        return None
    return _LabelledAxis(first_output_axis + found.axis, found.labels)


def _find_reshaped_axis(tracer: Tracer, spread: Tensor, written: Sequence[int]) -> _LabelledAxis | None:
    """Find the axis that has the labels; those of a single channel go along an axis of size one, or the only one."""
    candidates = [axis for axis, size in enumerate(spread.shape) if size == 1]
    if spread.dim() == 1:
        candidates = [0]
    if not candidates or _varying_axes(spread):
        return _find_axis(tracer, spread, written)
    labels = _labels_along(spread, candidates[0])
    return _LabelledAxis(candidates[0], labels)


def _blocks(shape: Sequence[int], output_shape: Sequence[int]) -> list[_Block]:
    """Cut two shapes into blocks of equal product; axes of size one at the end belong to the last block.

    Example:
        >>> _blocks((2, 6, 4, 4), (2, 3, 2, 16))
        [_Block(axes=[0], output_axes=[0]), _Block(axes=[1], output_axes=[1, 2]), _Block(axes=[2, 3], output_axes=[3])]
    """
    axes = deque(range(len(shape)))
    output_axes = deque(range(len(output_shape)))
    blocks = []
    while axes and output_axes:
        block = _Block([axes.popleft()], [output_axes.popleft()])
        product = shape[block.axes[0]]
        output_product = output_shape[block.output_axes[0]]
        while product != output_product:
            if product < output_product:
                axis = axes.popleft()
                block.axes.append(axis)
                product *= shape[axis]
            else:
                axis = output_axes.popleft()
                block.output_axes.append(axis)
                output_product *= output_shape[axis]
        blocks.append(block)
    if blocks:
        last = blocks[-1]
        last.axes.extend(axes)
        last.output_axes.extend(output_axes)
    return blocks


@rule("aten.as_strided_")
def restride(tracer: Tracer, call: Call) -> None:
    """Keep the channels of a tensor that only gets other strides, as adaptive pooling does to its output."""
    x = call.output
    labels_by_axis = tracer.all_labels(x)
    is_plain = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    sizes = dict(enumerate(x.shape))
    fits = all(len(labels) == sizes.get(axis) for axis, labels in labels_by_axis.items())
    if fits and is_plain:
        return
    for labels in labels_by_axis.values():
        tracer.mark_unprunable(labels, "is given strides by hand")
    tracer.set_labels(x, {})
