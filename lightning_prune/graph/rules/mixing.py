"""Operators that mix channels: convolutions, matrix products and what is built from them."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_prune.graph.convolutions import Convolution
from lightning_prune.graph.products import AxisOf, shared_axes
from lightning_prune.graph.rules.elementwise import combine
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []

_TWO_WEIGHTS = "sums over the product of two weights"
_TWO_ACTIVATIONS = "sums over the product of two activations"
_FIXED_MATRIX = "multiplies a matrix of fixed size"


# -- convolutions ------------------------------------------------------------------------------------------------------


@rule("aten.convolution", "aten._convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Tie the input's channels to the in-channel slice of the weight; the output has those of its out-channel slice."""
    conv = Convolution.of(call)
    spatial = _follow_spatial_axes(tracer, conv, call.output)
    _label_convolved(tracer, conv, call.output, spatial)


def _label_convolved(tracer: Tracer, conv: Convolution, output: Tensor, spatial: Mapping[int, Labels]) -> None:
    """Follow a convolution; what is along the spatial axes of its output is known."""
    convolve = _convolve_in_groups if _is_grouped(tracer, conv) else _convolve
    out_channels = convolve(tracer, conv)
    tracer.mark_out_slice(out_channels)
    if tracer.keeps_zero(conv.weight):
        tracer.keep_zero(output)
    if conv.bias is not None:
        tracer.tie_to(out_channels, conv.bias, 0, "has a bias of fixed size")
    output_labels = {conv.channel_axis: out_channels, **spatial}
    if conv.channel_axis > 0:
        output_labels[0] = tracer.labels(conv.x, 0)
    tracer.set_labels(output, output_labels)


def _follow_spatial_axes(tracer: Tracer, conv: Convolution, output: Tensor) -> dict[int, Labels]:
    """Make unprunable what lies along the kernel, and along spatial axes unless each position has one of the output.

    A kernel of a single position treats each channel there alone, as layers that mix patches do. A longer one along a
    row of channels, which weights them by their neighbours (ECA), works on fewer of them too, but is not mask-exact.
    """
    _mark_kernel(tracer, conv.weight)
    kept = {}
    for axis, labels in tracer.all_labels(conv.x).items():
        if axis <= conv.channel_axis:
            continue
        if not conv.is_plain or output.shape[axis] != len(labels):
            tracer.mark_unprunable(labels, "is a spatial axis of a convolution")
            continue
        kernel_axis = axis - conv.channel_axis + 1
        kernel_size = conv.weight.shape[kernel_axis]
        if kernel_size == 1:
            kept[axis] = labels
        elif conv.weight.dim() == 3:
            kept[axis] = labels
            tracer.mark_not_mask_exact(labels, "is convolved with its neighbouring channels")
        else:
            tracer.mark_unprunable(labels, "is a spatial axis of a convolution")
    return kept


def _mark_kernel(tracer: Tracer, weight: Tensor) -> None:
    for axis in range(2, weight.dim()):
        labels = tracer.labels(weight, axis)
        tracer.mark_unprunable(labels, "is the kernel size of a convolution")


def _is_grouped(tracer: Tracer, conv: Convolution) -> bool:
    """Tell whether a convolution has groups, or had several before all but one of them were pruned."""
    if conv.groups > 1:
        return True
    return _weight_name(tracer, conv) in tracer.grouped


def _weight_name(tracer: Tracer, conv: Convolution) -> str:
    """Name the weight, or the line of code that runs if the weight is computed."""
    name = tracer.name_of(conv.weight)
    return name or tracer.where() + tracer.line()


def _convolve(tracer: Tracer, conv: Convolution) -> Labels | None:
    """Consume every channel of the input; returns the labels of the output's channels."""
    in_channels = tracer.labels(conv.x, conv.channel_axis)
    in_slice = tracer.labels(conv.weight, conv.in_axis)
    fixed = "consumes an input of fixed size"
    if in_slice is None:
        fixed = "is consumed by a weight that cannot lose channels"
    tracer.tie(in_channels, in_slice, fixed)
    tracer.mark_consumed(conv.weight, conv.in_axis)
    return tracer.labels(conv.weight, conv.out_axis)


def _convolve_in_groups(tracer: Tracer, conv: Convolution) -> Labels | None:
    """Tie all inputs, outputs and kernels of a convolution group: they are one channel of the plan.

    A depthwise convolution, with or without a multiplier, has one input per convolution group. Returns the labels of
    the output's channels.
    """
    weight_name = _weight_name(tracer, conv)
    tracer.grouped.add(weight_name)
    in_channels = tracer.labels(conv.x, conv.channel_axis)
    outer = tracer.labels(conv.weight, 0)
    inner = tracer.labels(conv.weight, 1)
    tracer.mark_unprunable(inner, "is the inner side of a grouped convolution")
    if outer is None:
        tracer.mark_unprunable(in_channels, "is consumed by a grouped convolution of fixed size")
        return None
    by_group = outer.view(conv.groups, -1)  # (groups, labels of a group)
    one_per_group = by_group[:, :1]
    if len(outer) > conv.groups:
        same_in_group = one_per_group.expand_as(by_group)
        tracer.tie(outer, same_in_group.reshape(-1), "is a grouped convolution")
    in_per_group = conv.in_channels // conv.groups
    same_in_group = one_per_group.expand(-1, in_per_group)
    why = "is a grouped convolution that consumes an input of fixed size"
    tracer.tie(in_channels, same_in_group.reshape(-1), why)
    if not conv.transposed:
        return outer
    out_per_group = conv.weight.shape[1]
    return one_per_group.expand(-1, out_per_group).reshape(-1)


@rule("torchvision.deform_conv2d")
def deformable_convolution(tracer: Tracer, call: Call) -> None:
    """Follow a convolution whose weight is at places of its own, which cannot be pruned.

    Channels of the input that are at equal places in their offset groups are tied, so that these keep equal size.
    """
    conv = Convolution.of(call)
    for places in call.args[2:4]:
        labels = tracer.labels(places, 1)
        tracer.mark_unprunable(labels, "says where a convolution looks")
    _mark_kernel(tracer, conv.weight)
    for axis in (2, 3):
        labels = tracer.labels(conv.x, axis)
        tracer.mark_unprunable(labels, "is a spatial axis of a convolution")
    in_channels = tracer.labels(conv.x, 1)
    offset_groups = call.args[12]
    if in_channels is not None:
        in_offset_group = len(in_channels) // offset_groups
        tracer.tie_parts(in_channels, in_offset_group)
    _label_convolved(tracer, conv, call.output, spatial={})


# -- matrix products ---------------------------------------------------------------------------------------------------


@rule("aten.mm", "aten.bmm")
def matrix_product(tracer: Tracer, call: Call) -> None:
    """Tie the columns of the first matrix to the rows of the second; a weight consumes channels along that axis."""
    left, right = call.args[:2]
    _multiply(tracer, left, right, call.output)


@rule("aten.addmm", "aten.baddbmm")
def biased_matrix_product(tracer: Tracer, call: Call) -> None:
    """Tie as a matrix product does, then tie the output to a bias that is broadcast."""
    bias, left, right = call.args[:3]
    output = call.output
    _multiply(tracer, left, right, output)
    combine(tracer, [output, bias], output)


@rule("aten.linear")
def linear(tracer: Tracer, call: Call) -> None:
    """Tie the last axis of the input to the columns of the weight; the output has its rows, and is tied to a bias."""
    x, weight, *bias = call.given
    output = call.output
    last = x.dim() - 1
    kept = {axis: labels for axis, labels in tracer.all_labels(x).items() if axis != last}
    rows = tracer.labels(weight, 0)
    tracer.set_of_scores(output, False)
    inner = tracer.tie_axes(x, -1, weight, 1, _FIXED_MATRIX)
    x_is_weight, is_weight = tracer.is_weight(x), tracer.is_weight(weight)
    if x_is_weight:
        tracer.mark_consumed(x, -1)
        for labels in kept.values():
            tracer.mark_out_slice(labels)
    if is_weight:
        tracer.mark_consumed(weight, 1)
        tracer.mark_out_slice(rows)
    if not x_is_weight and not is_weight:
        tracer.mark_summed(inner, (x, weight), _TWO_ACTIVATIONS)
    elif tracer.keeps_zero(x if x_is_weight else weight):
        tracer.keep_zero(output)
    tracer.set_labels(output, {**kept, last: rows})
    if bias:
        combine(tracer, [output, *bias], output)


def _multiply(tracer: Tracer, left: Tensor, right: Tensor, output: Tensor) -> None:
    """Label the product of (rows, inner) and (inner, columns), or of as many such matrices as there are in a batch."""
    rows = tracer.labels(left, -2)
    columns = tracer.labels(right, -1)
    tracer.set_of_scores(output, False)
    inner = tracer.tie_axes(left, -1, right, -2, _FIXED_MATRIX)
    left_is_weight = tracer.is_weight(left)
    right_is_weight = tracer.is_weight(right)
    if left_is_weight:
        tracer.mark_consumed(left, -1)
        tracer.mark_out_slice(rows)
    if right_is_weight:
        tracer.mark_consumed(right, -2)
        tracer.mark_out_slice(columns)
    if not left_is_weight and not right_is_weight:
        _multiply_activations(tracer, left, right, output, inner)
    elif tracer.keeps_zero(left if left_is_weight else right):
        tracer.keep_zero(output)
    if output.dim() == 2:
        tracer.set_labels(output, {0: rows, 1: columns})
        return
    batch = tracer.labels(left, 0)
    tracer.tie(batch, tracer.labels(right, 0), "is a batch of matrices of fixed number")
    tracer.set_labels(output, {1: rows, 2: columns, 0: batch})


def _multiply_activations(
    tracer: Tracer,
    left: Tensor,
    right: Tensor,
    output: Tensor,
    inner: Labels | None,
) -> None:
    """Say what the channels of attention are: those that scores are summed over, of its values, and its heads."""
    tracer.mark_summed(inner, (left, right), _TWO_ACTIVATIONS)
    if left.dim() < 3:
        return
    rows, columns = tracer.labels(left, -2), tracer.labels(right, -1)
    tracer.mark_kind(tracer.labels(left, 0), "heads")
    if tracer.is_of_scores(left):
        tracer.mark_kind(columns, "value")
    elif tracer.is_of_scores(right):
        tracer.mark_kind(rows, "value")
    elif inner is not None:
        tracer.mark_kind(inner, "query-key")
        tracer.set_of_scores(output)
    else:  # of keys and values first
        tracer.mark_kind(rows, "query-key")
        tracer.mark_kind(columns, "value")


@rule("aten.mv", "aten.addmv")
def matrix_vector_product(tracer: Tracer, call: Call) -> None:
    """Tie the columns of a matrix to a vector; whichever is a weight consumes these channels."""
    *bias, matrix, vector = call.args
    rows = tracer.labels(matrix, 0)
    columns = tracer.tie_axes(matrix, 1, vector, 0, "multiplies a vector of fixed size")
    is_of_buffer = tracer.is_weight(matrix) and bool(tracer.name_of(vector))
    if tracer.of_weights or is_of_buffer:  # a norm of a weight, as spectral normalisation takes it
        tracer.mark_not_mask_exact(columns, _TWO_WEIGHTS)
    elif tracer.is_weight(vector):
        tracer.mark_consumed(vector, 0)
    elif tracer.is_weight(matrix):
        tracer.mark_consumed(matrix, 1)
        tracer.mark_out_slice(rows)
    else:
        tracer.mark_not_mask_exact(columns, _TWO_ACTIVATIONS)
    output = call.output
    tracer.set_labels(output, {0: rows})
    if bias:
        combine(tracer, [output, *bias], output)


@rule("aten.dot", "aten.vdot")
def dot(tracer: Tracer, call: Call) -> None:
    """Tie both vectors, which is not mask-exact: the number that they are summed up to depends on all channels."""
    first, second = call.args[:2]
    labels = tracer.tie_axes(first, 0, second, 0, "multiplies a vector of fixed size")
    tracer.mark_not_mask_exact(labels, "is summed up to one number")


@rule("aten._cdist_forward")
def distances(tracer: Tracer, call: Call) -> None:
    """Tie the channels that distances of rows are taken over, which is not mask-exact: a zero is at a distance, too."""
    left, right = call.args[:2]
    channels = tracer.labels(left, -1)
    tracer.tie(channels, tracer.labels(right, -1), "is compared with rows of fixed size")
    tracer.mark_not_mask_exact(channels, "takes distances over its channels")
    output = call.output
    output_axis = output.dim() - 2
    output_labels = {}
    for tensor in (left, right):
        rows = tracer.labels(tensor, -2)
        if tracer.is_weight(tensor):
            tracer.mark_out_slice(rows)
        output_labels[output_axis] = rows
        output_axis += 1
        for axis in range(tensor.dim() - 2):
            batch = tracer.labels(tensor, axis)
            tracer.mark_unprunable(batch, "is a batch of rows that are compared")
    tracer.set_labels(output, output_labels)


@rule("aten._trilinear")
def trilinear(tracer: Tracer, call: Call) -> None:
    """Tie the axes that tensors share in a product; a weight consumes channels along those that are summed over."""
    summed = call.args[6]
    output_labels = []
    for axis, sharing in enumerate(shared_axes(call)):
        labels = _tie_all(tracer, sharing)
        if axis in summed:
            _sum_over(tracer, sharing, labels)
            continue
        output_labels.append(labels)
        for tensor, own_axis in sharing:
            if tracer.is_weight(tensor):
                produced = tracer.labels(tensor, own_axis)
                tracer.mark_out_slice(produced)
    labels_by_axis = dict(enumerate(output_labels))
    tracer.set_labels(call.output, labels_by_axis)


def _tie_all(tracer: Tracer, sharing: Sequence[AxisOf]) -> Labels | None:
    """Tie the labels along an axis that tensors share, and return them."""
    first, *others = sharing
    labels = tracer.labels(*first)
    for other in others:
        labels = tracer.tie_axes(*first, *other, "multiplies a tensor of fixed size")
    return labels


def _sum_over(tracer: Tracer, sharing: Sequence[AxisOf], labels: Labels | None) -> None:
    """Let the weights among tensors consume the channels that they share; without one, a sum is not mask-exact."""
    has_weight = False
    for tensor, own_axis in sharing:
        if tracer.is_weight(tensor):
            has_weight = True
            tracer.mark_consumed(tensor, own_axis)
    if not has_weight:
        tracer.mark_not_mask_exact(labels, _TWO_ACTIVATIONS)


# -- attention ---------------------------------------------------------------------------------------------------------


@rule(
    "aten.scaled_dot_product_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_attention_math",
)  # fmt: skip
def attention(tracer: Tracer, call: Call) -> None:
    """Tie the width of queries to that of keys, which scores are summed over; the output has that of the values.

    All three are (*heads, sequence, width). Scores are scaled by a number that is given, or by the width. What each
    query gets depends on all keys, and on no other query unless attention is causal.
    """
    query, key, value = call.given[:3]
    width = tracer.tie_axes(query, -1, key, -1, "is multiplied by keys of fixed size")
    tracer.mark_summed(width, (query, key), _TWO_ACTIVATIONS)
    tracer.mark_kind(width, "query-key")
    tracer.mark_kind(tracer.labels(value, -1), "value")
    scale = call.kwargs.get("scale")
    tracer.computes_with(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    sequence = query.dim() - 2
    output_labels = {sequence: tracer.labels(query, sequence), sequence + 1: tracer.labels(value, -1)}
    for tensor in call.given if call.argument(5, "is_causal") else (key, value):
        tracer.mark_unprunable(tracer.labels(tensor, sequence), "is a sequence that attention runs over")
    for axis in range(sequence):
        heads = tracer.labels(query, axis)
        for tensor in (key, value):
            tracer.tie(heads, tracer.labels(tensor, axis), "attends to a fixed number of heads")
        output_labels[axis] = heads
        tracer.mark_kind(heads, "heads")
    attended = call.outputs[0]
    tracer.set_labels(attended, output_labels)
    tracer.set_of_scores(attended, False)
    tracer.shift_zero(attended)  # of scores that are zero, no share is
