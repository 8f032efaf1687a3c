"""Operators that shuffle channels among themselves or into pixels."""

import math

from torch import Tensor

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []


@rule("aten.pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """Tie the channels of a block, which is spread over the pixels of one channel of the output."""
    x, upscale = call.args[:2]
    block = upscale**2
    channel_axis = x.dim() - 3
    labels_by_axis = dict(tracer.all_labels(x))
    labels = labels_by_axis.get(channel_axis)
    if labels is not None:
        labels_by_axis[channel_axis] = _one_per_block(tracer, labels, block, "is shuffled into pixels")
    tracer.set_labels(call.output, labels_by_axis)


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """Turn the pixels of a channel into a block of channels, which are one channel of the plan."""
    x, downscale = call.args[:2]
    block = downscale**2
    channel_axis = x.dim() - 3
    labels_by_axis = dict(tracer.all_labels(x))
    labels = labels_by_axis.get(channel_axis)
    if labels is not None:
        labels_by_axis[channel_axis] = labels.repeat_interleave(block)
    tracer.set_labels(call.output, labels_by_axis)


@rule("aten.im2col")
def unfold(tracer: Tracer, call: Call) -> None:
    """Turn the patch around each pixel of a channel into a block of channels, which are one channel of the plan."""
    x, kernel_size = call.args[:2]
    labels_by_axis = _without_pixels(tracer, x)
    channel_axis = x.dim() - 3
    labels = labels_by_axis.get(channel_axis)
    if labels is not None:
        labels_by_axis[channel_axis] = labels.repeat_interleave(math.prod(kernel_size))
    tracer.set_labels(call.output, labels_by_axis)


def _without_pixels(tracer: Tracer, x: Tensor) -> dict[int, Labels]:
    """Make the labels along the last two axes unprunable, and return those along the others."""
    labels_by_axis = dict(tracer.all_labels(x))
    for axis in (x.dim() - 2, x.dim() - 1):
        tracer.mark_unprunable(labels_by_axis.pop(axis, None), "is a spatial axis that is cut into patches")
    return labels_by_axis


@rule("aten.col2im")
def fold(tracer: Tracer, call: Call) -> None:
    """Tie the channels of a block, which is spread over a patch of one channel of the output."""
    x, _, kernel_size = call.args[:3]
    block = math.prod(kernel_size)
    channel_axis = x.dim() - 2
    labels_by_axis = dict(tracer.all_labels(x))
    tracer.mark_unprunable(labels_by_axis.pop(channel_axis + 1, None), "is a row of patches")
    labels = labels_by_axis.get(channel_axis)
    if labels is not None:
        labels_by_axis[channel_axis] = _one_per_block(tracer, labels, block, "is put together from patches")
    tracer.set_labels(call.output, labels_by_axis)


def _one_per_block(tracer: Tracer, labels: Labels, block: int, why: str) -> Labels:
    """Tie the channels of each block, and return the first of each."""
    by_block = labels.view(-1, block)  # (blocks, channels of a block)
    one_per_block = by_block[:, 0].contiguous()
    same_in_block = one_per_block.repeat_interleave(block)
    tracer.tie(labels, same_in_block, why)
    return one_per_block


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """Interleave the channels of groups of equal size, which are tied so that they keep equal size."""
    x, groups = call.args[:2]
    labels_by_axis = dict(tracer.all_labels(x))
    labels = labels_by_axis.get(1)
    if labels is not None:
        by_group = labels.view(groups, -1)  # (groups, channels of a group)
        tracer.tie_parts(labels, by_group.shape[1])
        interleaved = by_group.t()
        labels_by_axis[1] = interleaved.reshape(-1)
    tracer.set_labels(call.output, labels_by_axis)
