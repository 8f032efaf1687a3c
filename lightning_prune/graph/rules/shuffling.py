"""Operators that shuffle channels among themselves or into pixels."""

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Tracer

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
        by_block = labels.view(-1, block)  # (blocks, channels of a block)
        one_per_block = by_block[:, 0]
        same_in_block = one_per_block.repeat_interleave(block)
        tracer.tie(labels, same_in_block, "is shuffled into pixels")
        labels_by_axis[channel_axis] = one_per_block.contiguous()
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
