"""What fvcore leaves out though it is made of multiply-adds: handles that count it.

fvcore knows convolutions by an operator that those whose padding is given by name (``padding="same"``) do not run as;
it knows no recurrent, bilinear and deformable layers, no attention that is written as one operator, and no product that
is added to a matrix or written as a sum over axes; and it counts a product of matrices by the size of the first, which
is too little where that is repeated for several second ones.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import isqrt, prod
from typing import Any

__all__ = ["HANDLES", "left_out"]

_CONVOLUTIONS = "convolutions with padding by name"
_RECURRENT = "recurrent layers"
_REPEATED = "products that repeat a matrix"
_BILINEAR = "bilinear layers"
_DEFORMABLE = "deformable convolutions"
_ATTENTION = "attention as one operator"
_ADDED = "products added to a matrix"
_SUMMED = "products written as sums over axes"
_NAMES = (
    _CONVOLUTIONS,
    _RECURRENT,
    _REPEATED,
    _BILINEAR,
    _DEFORMABLE,
    _ATTENTION,
    _ADDED,
    _SUMMED,
)

Handle = Callable[[list[Any], list[Any]], Counter[str]]  # is given what an operator takes and returns in TorchScript


def left_out(by_operator: Mapping[str, float]) -> dict[str, int]:
    """Return the FLOPs that only the handles here count, by what they are of.

    Args:
        by_operator: FLOPs by operator, as fvcore tells them with these handles.

    Example:
        >>> left_out({"conv": 100, "recurrent layers": 20})
        {'recurrent layers': 20}
    """
    flops = {}
    for what in _NAMES:
        counted = by_operator.get(what, 0)
        if counted:
            flops[what] = int(counted)
    return flops


def _convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter({_CONVOLUTIONS: _of_filters(inputs, outputs)})


def _deformable(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter({_DEFORMABLE: _of_filters(inputs, outputs)})


def _of_filters(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the elements of the filters, once for each sample and position of the output."""
    weight = _shape(inputs[1])
    output = _shape(outputs[0])
    out_channels = weight[0]
    samples_and_positions = prod(output) // out_channels
    return samples_and_positions * prod(weight)


def _bilinear(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of the weight, once for each row."""
    *rows, _ = _shape(inputs[0])
    weight = _shape(inputs[2])
    return Counter({_BILINEAR: prod(rows) * prod(weight)})


def _recurrent(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of all matrices, once for each sample and step."""
    *samples_and_steps, _ = _shape(inputs[0])
    elements = 0
    for parameter in _parameters(inputs):
        shape = _shape(parameter)
        if len(shape) == 2:
            elements += prod(shape)
    return Counter({_RECURRENT: prod(samples_and_steps) * elements})


def _parameters(inputs: list[Any]) -> list[Any]:
    """Return what is in the last list that a recurrent layer is given: one before it, if there is one, is of states."""
    found: list[Any] = []
    for value in inputs:
        node = value.node()
        if node.kind() == "prim::ListConstruct":
            found = list(node.inputs())
    return found


def _matrix_product(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count as fvcore does, and apart from it what that leaves out."""
    first = _shape(inputs[0])
    second = _shape(inputs[1])
    output = _shape(outputs[0])
    if len(second) == 1:  # a vector: free, as where it is multiplied by another operator; fvcore itself fails
        return Counter()
    inner = first[-1]
    columns = second[-1]
    by_fvcore = prod(first) * columns
    flops = prod(output) * inner
    return Counter({"matmul": by_fvcore, _REPEATED: flops - by_fvcore})


def _added_product(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of the first matrices, once for each column of the others; what they are added to is free."""
    first = _shape(inputs[1])
    second = _shape(inputs[2])
    columns = second[-1]
    flops = prod(first) * columns
    return Counter({_ADDED: flops})


def _summed_product(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of the output, once for each position that is summed over, which both tensors have."""
    first = _shape(inputs[0])
    second = _shape(inputs[1])
    output = prod(_shape(outputs[0]))
    if output == 0:
        return Counter()
    both = prod(first) * prod(second)
    summed_over = isqrt(both // output)
    flops = output * summed_over
    return Counter({_SUMMED: flops})


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the products of queries with keys and of weights with values, whatever a mask leaves out."""
    *rows, width = _shape(inputs[0])
    attended = _shape(inputs[1])[-2]
    value_width = _shape(inputs[2])[-1]
    both_widths = width + value_width
    flops = prod(rows) * attended * both_widths
    return Counter({_ATTENTION: flops})


def _shape(value: Any) -> list[int]:
    """Return the shape of a tensor in TorchScript."""
    sizes: list[int] = value.type().sizes()
    return sizes


HANDLES: dict[str, Handle] = {
    "aten::_convolution_mode": _convolution,
    "aten::matmul": _matrix_product,
    "aten::addbmm": _added_product,
    "aten::baddbmm": _added_product,
    "aten::inner": _summed_product,
    "aten::tensordot": _summed_product,
    "aten::scaled_dot_product_attention": _attention,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
    "aten::rnn_tanh": _recurrent,
    "aten::rnn_relu": _recurrent,
    "aten::bilinear": _bilinear,
    "torchvision::deform_conv2d": _deformable,
}
