"""Operators that mix channels: convolutions, matrix products and what is built from them."""

from torch import Tensor

from lightning_prune.graph.rules.elementwise import combine
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []


@rule("aten.convolution", "aten._convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Tie the input's channels to the weight's input side; the output has the labels of the output side."""
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    transposed, groups = call.argument(6, "transposed", False), call.argument(8, "groups", 1)
    channel = x.dim() - weight.dim() + 1  # an input without a batch axis has its channels first
    for axis in range(2, weight.dim()):
        tracer.mark_unprunable(tracer.labels(weight, axis), "is the kernel size of a convolution")
    for axis, labels in tracer.all_labels(x).items():
        if axis > channel:
            tracer.mark_unprunable(labels, "is a spatial axis of a convolution")
    inlet, outlet = (0, 1) if transposed else (1, 0)
    if groups == 1 and _identity(tracer, weight) not in tracer.grouped:
        tracer.tie(tracer.labels(x, channel), tracer.labels(weight, inlet), "reads an input of fixed size")
        _read(tracer, weight, inlet)
        made = tracer.labels(weight, outlet)
    else:
        made = _grouped(tracer, tracer.labels(x, channel), weight, x.shape[channel], groups, transposed)
    tracer.mark_out_slice(made)
    if bias is not None:
        tracer.tie(made, tracer.labels(bias, 0), "has a bias of fixed size")
    batch = {0: tracer.labels(x, 0)} if channel > 0 else {}
    tracer.set_labels(call.output, {**batch, channel: made})


def _identity(tracer: Tracer, weight: Tensor) -> str:
    """Name a weight, or the place where it is read if it is computed."""
    return tracer.name_of(weight) or tracer.where() + tracer.line()


def _read(tracer: Tracer, weight: Tensor, axis: int) -> None:
    """Note that a weight reads channels along one axis, and whether its parameters can be masked in its place."""
    labels = tracer.labels(weight, axis)
    tracer.mark_in_slice(labels)
    if tracer.shifts_zero(weight):
        tracer.mark_not_mask_exact(labels, "reads channels by a weight that is not zero where its parameters are")


def _grouped(
    tracer: Tracer, read: Labels | None, weight: Tensor, channels: int, groups: int, transposed: bool
) -> Labels | None:
    """Let whole convolution groups leave: a group's inputs, outputs and kernels are one channel of the plan.

    A depthwise convolution is the case of one input a group, with or without a multiplier.
    """
    tracer.grouped.add(_identity(tracer, weight))
    full, shared = tracer.labels(weight, 0), tracer.labels(weight, 1)
    tracer.mark_unprunable(shared, "is the inner side of a grouped convolution")
    if full is None:
        tracer.mark_unprunable(read, "is read by a grouped convolution of fixed size")
        return None
    first = full.view(groups, -1)[:, :1]  # one label stands for its convolution group
    if full.numel() > groups:
        tracer.tie(full, first.expand(groups, full.numel() // groups).reshape(-1), "is a grouped convolution")
    tied = first.expand(groups, channels // groups).reshape(-1)
    tracer.tie(read, tied, "is a grouped convolution that reads an input of fixed size")
    if not transposed:
        return full
    return first.expand(groups, weight.shape[1]).reshape(-1)


def _contract(tracer: Tracer, left: Tensor, left_axis: int, right: Tensor, right_axis: int) -> None:
    """Tie the axis that a matrix product sums over, and note which weight reads and which makes channels."""
    summed = tracer.labels(left, left_axis)
    tracer.tie(summed, tracer.labels(right, right_axis), "multiplies a matrix of fixed size")
    if not tracer.is_weight(left) and not tracer.is_weight(right):
        tracer.mark_not_mask_exact(summed, "sums over the product of two activations")
    for operand, inner in ((left, left_axis), (right, right_axis)):
        if tracer.is_weight(operand):
            _read(tracer, operand, inner)
            outer = operand.dim() - 1 if inner % operand.dim() == operand.dim() - 2 else operand.dim() - 2
            tracer.mark_out_slice(tracer.labels(operand, outer))


@rule("aten.mm", "aten.bmm")
def matrix_product(tracer: Tracer, call: Call) -> None:
    """Sum over the last axis of the first matrix and the one before last of the second."""
    _matrix_product(tracer, call.args[0], call.args[1], call.output)


def _matrix_product(tracer: Tracer, left: Tensor, right: Tensor, output: Tensor) -> None:
    _contract(tracer, left, -1, right, -2)
    last = output.dim() - 1
    axes = {last - 1: tracer.labels(left, -2), last: tracer.labels(right, -1)}
    if last == 2:
        tracer.tie(tracer.labels(left, 0), tracer.labels(right, 0), "is a batch of matrices of fixed number")
        axes[0] = tracer.labels(left, 0)
    tracer.set_labels(output, axes)


@rule("aten.addmm", "aten.baddbmm")
def biased_matrix_product(tracer: Tracer, call: Call) -> None:
    """Add a bias, broadcast, to a matrix product."""
    bias, left, right = call.args[0], call.args[1], call.args[2]
    _matrix_product(tracer, left, right, call.output)
    combine(tracer, [call.output, bias], call.output)


@rule("aten.mv", "aten.addmv")
def matrix_vector_product(tracer: Tracer, call: Call) -> None:
    """Sum over the vector."""
    *bias, matrix, vector = call.args
    tracer.tie(tracer.labels(matrix, 1), tracer.labels(vector, 0), "multiplies a vector of fixed size")
    if tracer.is_weight(vector):
        _read(tracer, vector, 0)
    elif tracer.is_weight(matrix):
        _read(tracer, matrix, 1)
        tracer.mark_out_slice(tracer.labels(matrix, 0))
    else:
        tracer.mark_not_mask_exact(tracer.labels(matrix, 1), "sums over the product of two activations")
    tracer.set_labels(call.output, {0: tracer.labels(matrix, 0)})
    if bias:
        combine(tracer, [call.output, bias[0]], call.output)


@rule("aten.dot", "aten.vdot")
def dot(tracer: Tracer, call: Call) -> None:
    """Sum over both vectors: what is left depends on all channels, whatever reads it."""
    for vector in call.args[:2]:
        tracer.mark_unprunable(tracer.labels(vector, 0), "is summed up to one number")


@rule("aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_attention_math")
def attention(tracer: Tracer, call: Call) -> None:
    """Keep the width of queries and keys whole, because their scale depends on it; pass on that of the values."""
    query, key, value = call.args[:3]
    for tensor in (query, key):
        tracer.mark_unprunable(tracer.labels(tensor, -1), "is the width of an attention head")
    for tensor in (query, key, value):
        tracer.mark_unprunable(tracer.labels(tensor, -2), "is a sequence that attention runs over")
    last = query.dim() - 1
    for axis in range(last - 1):
        for other in (key, value):
            tracer.tie(tracer.labels(query, axis), tracer.labels(other, axis), "attends to a fixed number of heads")
    heads = {axis: labels for axis, labels in tracer.all_labels(query).items() if axis < last - 1}
    outputs = call.outputs
    tracer.set_labels(outputs[0], {**heads, last: tracer.labels(value, -1)})
