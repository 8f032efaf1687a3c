"""Operators that move data without changing it: the labels move along."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.rules.elementwise import same_shape
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import FIXED, Call, Labels, Tracer

__all__: list[str] = []


def _spread(labels: Labels, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Expand labels along one axis to the shape of their tensor, without memory."""
    return labels.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _varying(moved: Tensor) -> list[int]:
    """Return the axes along which labels differ."""
    strides = moved.stride()
    once = moved[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]  # all that is in memory
    return [
        axis for axis, size in enumerate(once.shape) if size > 1 and not bool((once == once.narrow(axis, 0, 1)).all())
    ]


def _line(moved: Tensor, axis: int) -> Labels:
    """Return the labels along one axis, at the first position of all others."""
    return moved[tuple(slice(None) if other == axis else 0 for other in range(moved.dim()))].contiguous()


def _one_axis(tracer: Tracer, moved: Tensor) -> tuple[int, Labels] | None:
    """Return the axis along which labels vary, and the labels; those along several are tied until one is left.

    An axis that was split is tied so that the channels at equal places of all outer parts leave together; the outer
    parts keep their number and the inner one becomes shorter.
    """
    varying = _varying(moved)
    if not varying:
        if moved.numel() > 0:
            tracer.mark_unprunable(moved.reshape(-1)[:1], "has one of its channels picked out")
        return None
    axis = varying[0]
    if len(varying) > 1:
        axis = varying[tracer.split_axis(tuple(moved.shape[a] for a in varying))]
        along = _line(moved, axis)
        tracer.tie(moved.reshape(-1), _spread(along, axis, moved.shape).reshape(-1), "is split into parts")
        return axis, along
    return axis, _line(moved, axis)


def _give(tracer: Tracer, output: Tensor, axis: int, labels: Labels) -> None:
    """Add the labels along one axis to those that an output has."""
    known = dict(tracer.all_labels(output))
    if axis in known:
        for both in (known.pop(axis), labels):
            tracer.mark_unprunable(both, "holds two kinds of channels along one axis")
    else:
        known[axis] = labels
    tracer.set_labels(output, known)


def _move(tracer: Tracer, call: Call, move: Callable[..., Any]) -> None:
    x, rest = call.args[0], call.args[1:]
    for axis, labels in tracer.all_labels(x).items():
        moved = move(_spread(labels, axis, x.shape), *rest, **call.kwargs)
        for output, part in zip(call.outputs, moved if isinstance(moved, tuple | list) else [moved], strict=True):
            found = _one_axis(tracer, part)
            if found is not None:
                _give(tracer, output, *found)


@rule("aten.expand", "aten.repeat", "aten.flip", "aten.tile", "aten.repeat_interleave")
def move(tracer: Tracer, call: Call) -> None:
    """Move the labels by calling the operator on them."""
    _move(tracer, call, call.operator)


@rule("aten.permute", "aten.transpose", "aten.t", "aten.squeeze", "aten.unsqueeze", "aten.numpy_T", "aten.movedim")
def rearrange(tracer: Tracer, call: Call) -> None:
    """Find out where each axis goes by calling the operator on an empty tensor whose strides tell its axes apart.

    An axis that is squeezed away held a single channel.
    """
    x = call.args[0]
    known = tracer.all_labels(x)
    strides = [1000 + axis for axis in range(x.dim())]
    numbered = torch.empty_strided([2 if size > 1 else 1 for size in x.shape], strides, device="meta")
    moved = call.operator(numbered, *call.args[1:], **call.kwargs)
    to = {stride: axis for axis, stride in enumerate(moved.stride())}
    for axis in known.keys() - {stride - 1000 for stride in to}:
        tracer.mark_unprunable(known[axis], "has one of its channels picked out")
    for axis in _axes_squeezed(call) & known.keys():
        tracer.mark_squeezed(known[axis])
    tracer.set_labels(call.output, {to[1000 + axis]: known[axis] for axis in known if 1000 + axis in to})


def _axes_squeezed(call: Call) -> set[int]:
    dimensions = call.args[0].dim()
    if call.name != "aten.squeeze":
        return set()
    axes = call.argument(1, "dim", range(dimensions))
    return {axis % dimensions for axis in ([axes] if isinstance(axes, int) else axes)}


@rule("aten.view", "aten._unsafe_view", "aten.reshape")
def reshape(tracer: Tracer, call: Call) -> None:
    """Reshape the labels, block by block: axes that are merged or split have a common product before and after."""
    x, output = call.args[0], call.output
    for before, after in _blocks(tuple(x.shape), tuple(output.shape)):
        for axis in before:
            labels = tracer.labels(x, axis)
            if labels is None:
                continue
            if len(before) == len(after) == 1:
                _give(tracer, output, after[0], labels)
                continue
            spread = _spread(labels, axis - before[0], tuple(x.shape[a] for a in before))
            found = _reshaped(tracer, spread.reshape([output.shape[a] for a in after]))
            if found is not None:
                _give(tracer, output, after[found[0]], found[1])


def _reshaped(tracer: Tracer, moved: Tensor) -> tuple[int, Labels] | None:
    """Return the axis that has the labels; all of a single channel goes along an axis of size one, or the only one."""
    short = [axis for axis, size in enumerate(moved.shape) if size == 1]
    if (short or moved.dim() == 1) and not _varying(moved):
        axis = short[0] if short else 0
        return axis, _line(moved, axis)
    return _one_axis(tracer, moved)


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair up runs of axes of equal product; axes of size one that are left over at the end are in the last."""
    left, right = list(range(len(before))), list(range(len(after)))
    found: list[tuple[list[int], list[int]]] = []
    while left and right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        product, other = before[ours[0]], after[theirs[0]]
        while product != other:
            if product < other:
                ours.append(left.pop(0))
                product *= before[ours[-1]]
            else:
                theirs.append(right.pop(0))
                other *= after[theirs[-1]]
        found.append((ours, theirs))
    if found:
        found[-1][0].extend(left)
        found[-1][1].extend(right)
    return found


@rule("aten.as_strided_")
def restride(tracer: Tracer, call: Call) -> None:
    """Keep the labels of a tensor that only gets other strides, as adaptive pooling does to its output."""
    x = call.output
    known = tracer.all_labels(x)
    same = all(axis < x.dim() and len(labels) == x.shape[axis] for axis, labels in known.items())
    if same and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return
    for labels in known.values():
        tracer.mark_unprunable(labels, "is given strides by hand")
    tracer.set_labels(x, {})


# -- parts -------------------------------------------------------------------------------------------------------------


@rule("aten.slice", "aten.narrow")
def part(tracer: Tracer, call: Call) -> None:
    """Take a part along an axis. A half, a third ... is tied to the other parts, so that all keep equal size."""
    x, output = call.args[0], call.output
    axis = call.argument(1, "dim", 0) % x.dim()
    labels = tracer.labels(x, axis)
    if labels is None or output.shape == x.shape:
        return same_shape(tracer, call)
    own = call.operator(labels, 0, *call.args[2:], **{k: v for k, v in call.kwargs.items() if k != "dim"})
    size = len(own)
    if size and len(labels) % size == 0 and torch.equal(own, labels[(start := _start(labels, own)) : start + size]):
        tracer.tie_parts(labels, size)
    elif not size:
        tracer.mark_unprunable(labels, "has none of its channels taken")
    tracer.set_labels(output, {**tracer.all_labels(x), axis: own})
    return None


def _start(labels: Labels, own: Labels) -> int:
    return int((labels == own[0]).nonzero()[0, 0])


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split", "aten.unsafe_chunk")
def split(tracer: Tracer, call: Call) -> None:
    """Take an axis apart; parts of equal size stay of equal size."""
    x = call.args[0]
    axis = call.argument(2, "dim", 0) % x.dim()
    labels = tracer.labels(x, axis)
    sizes = [output.shape[axis] for output in call.outputs]
    known = dict(tracer.all_labels(x))
    parts = labels.split(sizes) if labels is not None else [None] * len(sizes)
    if labels is not None and len(set(sizes)) == 1:
        tracer.tie_parts(labels, sizes[0])
    for output, own in zip(call.outputs, parts, strict=True):
        tracer.set_labels(output, {**known, axis: own})


@rule("aten.glu")
def gated(tracer: Tracer, call: Call) -> None:
    """Multiply one half of the channels by a function of the other."""
    x = call.args[0]
    axis = call.argument(1, "dim", -1) % x.dim()
    labels = tracer.labels(x, axis)
    known = dict(tracer.all_labels(x))
    if labels is not None:
        size = len(labels) // 2
        tracer.tie_parts(labels, size)
        known[axis] = labels[:size]
    tracer.set_labels(call.output, known)


@rule("aten.select", "aten.unbind", "aten.index_select", "aten.index", "aten.roll", "aten.unfold", "aten.gather")
def picked(tracer: Tracer, call: Call) -> None:
    """Pick by number along an axis; channels that are themselves picked stay whole."""
    x = call.args[0]
    taken = _axes_picked(call) if call.name != "aten.gather" else set(range(x.dim()))
    touched = {axis: labels for axis, labels in tracer.all_labels(x).items() if axis in taken}
    for labels in touched.values():
        tracer.mark_unprunable(labels, f"has its channels picked by {call.name.removeprefix('aten.')}")
    if call.name == "aten.index":
        return _indexed(tracer, call, taken)
    if call.name in ("aten.roll", "aten.gather"):
        return None if call.name == "aten.gather" else same_shape(tracer, call)
    drops = call.name in ("aten.select", "aten.unbind")
    for output in call.outputs:
        kept = {a: labels for a, labels in tracer.all_labels(x).items() if a not in taken}
        tracer.set_labels(output, {a - (drops and a > min(taken)): labels for a, labels in kept.items()})
    return None


def _axes_picked(call: Call) -> set[int]:
    dimensions = call.args[0].dim()
    if call.name == "aten.index":
        return _axes_indexed(call.args[1])
    if call.name == "aten.roll":  # without axes as one long row
        return {axis % dimensions for axis in call.argument(2, "dims") or range(dimensions)}
    return {call.argument(1, "dim", 0) % dimensions}


def _axes_indexed(indices: list[Tensor | None]) -> set[int]:
    """Return the axes that are indexed; a mask is over as many as it has itself."""
    taken: set[int] = set()
    axis = 0
    for index in indices:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            taken.update(range(axis, axis + width))
        axis += width
    return taken


def _indexed(tracer: Tracer, call: Call, taken: set[int]) -> None:
    """Follow axes in front of and behind neighbouring indexed ones; others are held."""
    x, output = call.args[0], call.output
    first, last = min(taken), max(taken)
    neighbours = last - first + 1 == len(taken)
    known = {}
    for axis, labels in tracer.all_labels(x).items():
        if axis in taken:
            continue
        if neighbours:
            known[axis if axis < first else axis + output.dim() - x.dim()] = labels
        else:
            tracer.mark_unprunable(labels, "is indexed along several axes")
    tracer.set_labels(output, known)


# -- joining and padding -----------------------------------------------------------------------------------------------


@rule("aten.cat", "aten.concat")
def concatenate(tracer: Tracer, call: Call) -> None:
    """Put the labels side by side."""
    tensors = [t for t in call.args[0] if t.dim() == call.output.dim()]
    axis = call.argument(1, "dim", 0) % call.output.dim()
    result: dict[int, Labels | None] = {}
    if any(axis in tracer.all_labels(t) for t in tensors):
        parts = [(tracer.labels(t, axis), t.shape[axis]) for t in tensors]
        result[axis] = torch.cat(
            [labels if labels is not None else torch.full((size,), FIXED) for labels, size in parts]
        )
    for other in range(call.output.dim()):
        if other != axis and any(other in tracer.all_labels(t) for t in tensors):
            result[other] = _beside(tracer, [tracer.labels(t, other) for t in tensors])
    tracer.set_labels(call.output, result)


def _beside(tracer: Tracer, along: list[Labels | None]) -> Labels:
    """Tie the labels of tensors along an axis that they share."""
    shared = next(labels for labels in along if labels is not None)
    for labels in along:
        tracer.tie(shared, labels, "is put beside a tensor of fixed size")
    return shared


@rule("aten.stack")
def stack(tracer: Tracer, call: Call) -> None:
    """Put tensors side by side along a new axis."""
    tensors = call.args[0]
    new = call.argument(1, "dim", 0) % call.output.dim()
    result: dict[int, Labels | None] = {}
    for axis in range(tensors[0].dim()):
        if any(axis in tracer.all_labels(t) for t in tensors):
            result[axis + (axis >= new)] = _beside(tracer, [tracer.labels(t, axis) for t in tensors])
    tracer.set_labels(call.output, result)


@rule("aten.constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> None:
    """Pad the labels; what is added along the channels is of fixed number."""
    x, amounts = call.args[0], list(call.args[1])
    result: dict[int, Labels | None] = {}
    for axis, labels in tracer.all_labels(x).items():
        behind = x.dim() - 1 - axis
        around = amounts[2 * behind : 2 * behind + 2]
        result[axis] = torch.constant_pad_nd(labels, around, FIXED) if around else labels
    tracer.set_labels(call.output, result)


# -- shuffles ----------------------------------------------------------------------------------------------------------


@rule("aten.pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """Spread blocks of channels over pixels: the channels of a block leave together."""
    x, square = call.args[0], call.args[1] ** 2
    known = dict(tracer.all_labels(x))
    labels = known.get(x.dim() - 3)
    if labels is not None:
        first = labels.view(-1, square)[:, 0]
        tracer.tie(labels, first.repeat_interleave(square), "is shuffled into pixels")
        known[x.dim() - 3] = first.contiguous()
    tracer.set_labels(call.output, known)


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """Turn pixels into channels: a channel becomes a block of channels."""
    x = call.args[0]
    known = dict(tracer.all_labels(x))
    labels = known.get(x.dim() - 3)
    if labels is not None:
        known[x.dim() - 3] = labels.repeat_interleave(call.args[1] ** 2)
    tracer.set_labels(call.output, known)


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """Interleave equal parts of the channels."""
    x, groups = call.args[0], call.args[1]
    known = dict(tracer.all_labels(x))
    labels = known.get(1)
    if labels is not None:
        tracer.tie_parts(labels, len(labels) // groups)
        known[1] = labels.view(groups, -1).t().reshape(-1)
    tracer.set_labels(call.output, known)
