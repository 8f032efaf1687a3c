"""Costs of operators, as fvcore counts them: one fused multiply-add is one FLOP.

fvcore counts convolutions and matrix products by their multiply-adds, normalisation by passes over its input (five
with affine parameters, four without; two and one by running statistics), adaptive average pooling by its input, and
resizing and sampling on a grid by their output; other operators are free, products with a vector too. What fvcore
leaves out by mistake is counted here: convolutions whose padding is given by name, recurrent, bilinear and deformable
layers, matrix products in which one matrix is repeated, those that are added to a matrix or written as sums over axes,
and the two products of attention that is written as one operator. `lightning_prune.reporting.flops` tells both counts.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F

from lightning_prune.graph.convolutions import Convolution
from lightning_prune.graph.products import AxisOf, shared_axes
from lightning_prune.graph.recurrent import Recurrent
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__ = ["COSTS"]

Cost = Callable[[Tracer, Call], None]
COSTS: dict[str, Cost] = {}

_INSTANCE_NORM = F.instance_norm.__code__
_ADAPTIVE_POOLING = F.adaptive_avg_pool2d.__code__


def _cost(*operators: str) -> Callable[[Cost], Cost]:
    """Register what adds the cost of some operators to the tracer's record."""

    def register(function: Cost) -> Cost:
        for operator in operators:
            COSTS[operator] = function
        return function

    return register


# -- multiply-adds -----------------------------------------------------------------------------------------------------


@_cost("aten.convolution", "aten._convolution", "torchvision.deform_conv2d")
def _convolution(tracer: Tracer, call: Call) -> None:
    conv = Convolution.of(call)
    slid_over = conv.x if conv.transposed else call.output
    positions = tracer.axes(slid_over)
    del positions[conv.channel_axis]
    kernel_size = conv.weight.shape[2:].numel()
    channels, other_channels, *_ = tracer.axes(conv.weight)
    tracer.cost(kernel_size, *positions, channels, other_channels)


@_cost("aten._trilinear")
def _trilinear(tracer: Tracer, call: Call) -> None:
    """Count every element of the product; tensors that share an axis are tied along it."""
    axes = [_length(tracer, sharing) for sharing in shared_axes(call)]
    tracer.cost(1, *axes)


def _length(tracer: Tracer, sharing: Sequence[AxisOf]) -> Labels | int:
    """Return the labels along an axis that tensors share, or its size where none has any."""
    size = 1
    for tensor, axis in sharing:
        size = tensor.shape[axis]
        labels = tracer.labels(tensor, axis)
        if labels is not None:
            return labels
    return size


@_cost("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.addbmm")
def _matrix_product(tracer: Tracer, call: Call) -> None:
    left, right = call.args[-2:]  # a bias comes first
    *_, columns = tracer.axes(right)
    tracer.cost(1, *tracer.axes(left), columns)


@_cost("aten.linear")
def _linear(tracer: Tracer, call: Call) -> None:
    x, weight = call.given[:2]
    rows, *_ = tracer.axes(weight)
    tracer.cost(1, *tracer.axes(x), rows)


@_cost("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def _recurrent(tracer: Tracer, call: Call) -> None:
    """Count the products of all weights with the input and the state of each step."""
    layers = Recurrent.of(call)
    positions = layers.x.shape[:-1].numel()
    for cells in layers.layers:
        for cell in cells:
            tracer.cost(positions, *tracer.axes(cell.of_input))
            tracer.cost(positions, *tracer.axes(cell.of_state))
            if cell.projection is not None:
                tracer.cost(positions, *tracer.axes(cell.projection))


@_cost(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
def _attention(tracer: Tracer, call: Call) -> None:
    """Count the products of queries with keys, and of what comes of them with values, whatever a mask leaves out."""
    query, key, value = call.given[:3]
    *rows, width = tracer.axes(query)
    *_, attended, _ = tracer.axes(key)
    *_, value_width = tracer.axes(value)
    tracer.cost(1, *rows, width, attended)
    tracer.cost(1, *rows, attended, value_width)


# -- passes over a tensor ----------------------------------------------------------------------------------------------


@_cost(
    "aten.native_batch_norm",
    "aten.cudnn_batch_norm",
    "aten._native_batch_norm_legit_no_training",
    "aten._batch_norm_no_update",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
    "aten._batch_norm_with_update",
    "aten.miopen_batch_norm",
    "aten.batch_norm",
)
def _batch_norm(tracer: Tracer, call: Call) -> None:
    """Normalisation of instances runs as one of batches, and counts as one that finds its statistics itself."""
    x = call.args[0]
    is_affine = call.argument(1, "weight") is not None
    finds_statistics = _is_training(call) or tracer.inside(_INSTANCE_NORM)
    passes = 4 if finds_statistics else 1
    tracer.cost(passes + is_affine, *tracer.axes(x))


def _is_training(call: Call) -> bool:
    """Tell whether a batch normalisation takes its statistics from its input: an argument of most such operators."""
    if call.name == "aten._batch_norm_with_update":
        return True
    names = [argument.name for argument in call.operator._schema.arguments]
    if "training" not in names:
        return False
    return bool(call.argument(names.index("training"), "training"))


@_cost("aten.native_layer_norm")
def _layer_norm(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    is_affine = call.argument(2, "weight") is not None
    tracer.cost(4 + is_affine, *tracer.axes(x))


@_cost("aten.native_group_norm")
def _group_norm(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    is_affine = call.argument(1, "weight") is not None
    tracer.cost(4 + is_affine, *tracer.axes(x))


@_cost("aten._adaptive_avg_pool2d", "aten.mean")
def _adaptive_pooling(tracer: Tracer, call: Call) -> None:
    """Adaptive pooling to one pixel runs as a mean; one that somebody wrote is free, and so is pooling of one axis."""
    if tracer.inside(_ADAPTIVE_POOLING):
        x = call.args[0]
        tracer.cost(1, *tracer.axes(x))


@_cost("aten.upsample_nearest2d")
def _nearest_upsampling(tracer: Tracer, call: Call) -> None:
    tracer.cost(1, *tracer.axes(call.output))


@_cost("aten.upsample_bilinear2d", "aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler")
def _bilinear_sampling(tracer: Tracer, call: Call) -> None:
    tracer.cost(4, *tracer.axes(call.output))
