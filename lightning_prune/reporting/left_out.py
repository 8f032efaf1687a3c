"""What fvcore leaves out though it is made of multiply-adds: handles that count it.

fvcore knows convolutions by an operator that those whose padding is given by name (``padding="same"``) do not run as;
it knows no recurrent layers; and it counts a product of matrices by the size of the first, which is too little where
that is repeated for several second ones.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

__all__ = ["HANDLES", "left_out"]

_CONVOLUTIONS = "convolutions with padding by name"
_RECURRENT = "recurrent layers"
_REPEATED = "products that repeat a matrix"

Handle = Callable[[list[Any], list[Any]], Counter[str]]  # is given what an operator takes and returns in TorchScript


def left_out(by_operator: Mapping[str, float]) -> dict[str, int]:
    """Return the FLOPs that only the handles here count, by what they are of.

    Args:
        by_operator: FLOPs by operator, as fvcore tells them with these handles.

    Example:
        >>> left_out({"conv": 100, "recurrent layers": 20})
        {'recurrent layers': 20}
    """
    of_handles = {what: int(by_operator.get(what, 0)) for what in (_CONVOLUTIONS, _RECURRENT, _REPEATED)}
    return {what: flops for what, flops in of_handles.items() if flops}


def _convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of the filters, once for each sample and position of the output."""
    weight = _shape(inputs[1])
    samples_and_positions = prod(_shape(outputs[0])) // weight[0]
    return Counter({_CONVOLUTIONS: samples_and_positions * prod(weight)})


def _recurrent(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count the elements of all matrices, once for each sample and step."""
    samples_and_steps = prod(_shape(inputs[0])[:-1])
    lists = [value.node() for value in inputs if value.node().kind() == "prim::ListConstruct"]
    parameters = [_shape(value) for value in lists[-1].inputs()]  # the first list, if there are two, is of states
    elements = sum(prod(shape) for shape in parameters if len(shape) == 2)
    return Counter({_RECURRENT: samples_and_steps * elements})


def _matrix_product(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    first, second = _shape(inputs[0]), _shape(inputs[1])
    if len(second) == 1:  # a vector: free, as where it is multiplied by another operator; fvcore itself fails
        return Counter()
    counted = prod(first) * second[-1]
    flops = prod(_shape(outputs[0])) * first[-1]
    return Counter({"matmul": counted, _REPEATED: flops - counted})


def _shape(value: Any) -> list[int]:
    """Return the shape of a tensor in TorchScript."""
    sizes: list[int] = value.type().sizes()
    return sizes


HANDLES: dict[str, Handle] = {
    "aten::_convolution_mode": _convolution,
    "aten::matmul": _matrix_product,
    **{f"aten::{layer}": _recurrent for layer in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
