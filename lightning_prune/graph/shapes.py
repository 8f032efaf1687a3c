"""Output shapes of the operators that networks spend most of their calls on.

PyTorch knows the shape of every output, but finds it in Python code that takes up to milliseconds a call. A function
here returns an output without data, or NotImplemented wherever its arguments are not the plain case.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPES"]

Shape = Callable[..., Any]
SHAPES: dict[str, Shape] = {}


def _shape_of(*operators: str) -> Callable[[Shape], Shape]:
    """Register what returns the output of some operators on tensors without data."""

    def register(function: Shape) -> Shape:
        for operator in operators:
            SHAPES[operator] = function
        return function

    return register


@_shape_of("aten.convolution")
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    if transposed or not _fits_convolution(x, weight, bias, groups):
        return NotImplemented
    kernel = weight.shape[2:]
    steps = _per_axis(stride, kernel)
    paddings = _per_axis(padding, kernel)
    dilations = _per_axis(dilation, kernel)
    spatial = []
    for axis, kernel_size in enumerate(kernel):
        covered = dilations[axis] * (kernel_size - 1) + 1
        padded = x.shape[2 + axis] + 2 * paddings[axis]
        size = (padded - covered) // steps[axis] + 1
        if size < 1:
            return NotImplemented
        spatial.append(size)
    return x.new_empty((x.shape[0], weight.shape[0], *spatial))


def _fits_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    """Tell whether the arguments are of the plain case, (batch, in_channels, *spatial) and no error."""
    if not x.is_meta or x.dim() != weight.dim() or x.dtype != weight.dtype:
        return False
    out_channels, in_channels_of_group = weight.shape[:2]
    if out_channels % groups > 0 or x.shape[1] != in_channels_of_group * groups:
        return False
    return bias is None or bias.shape[0] == out_channels


def _per_axis(setting: list[int], kernel: Sequence[int]) -> list[int]:
    """Repeat a setting that is given once for all axes."""
    return setting * len(kernel) if len(setting) == 1 else setting


@_shape_of("aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training")
def _batch_norm(x: Tensor, *arguments: Any) -> Any:
    if not x.is_meta or x.dim() < 2:
        return NotImplemented
    channels = x.shape[1:2]
    for per_channel in arguments:
        if isinstance(per_channel, Tensor) and not _is_like(per_channel, channels, x):
            return NotImplemented
    return _normalised(x)


@_shape_of("aten.native_layer_norm")
def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    normalized_shape = x.shape[-len(shape) :]
    if not x.is_meta or list(normalized_shape) != list(shape):
        return NotImplemented
    for parameter in (weight, bias):
        if parameter is not None and not _is_like(parameter, normalized_shape, x):
            return NotImplemented
    return _normalised(x)


def _is_like(tensor: Tensor, shape: torch.Size, x: Tensor) -> bool:
    return tensor.shape == shape and tensor.dtype == x.dtype


def _normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an output, and statistics that nothing looks at."""
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


@_shape_of(
    "aten.relu", "aten.hardtanh", "aten.silu", "aten.gelu", "aten.hardswish", "aten.hardsigmoid", "aten.sigmoid",
    "aten.tanh", "aten.leaky_relu", "aten.elu", "aten.mish",
)  # fmt: skip
def _activation(x: Tensor, *numbers: Any, **named: Any) -> Any:
    if x.is_meta and x.is_floating_point():
        return torch.empty_like(x)
    return NotImplemented


@_shape_of(
    "aten.relu_", "aten.hardtanh_", "aten.silu_", "aten.hardswish_", "aten.hardsigmoid_", "aten.sigmoid_",
    "aten.leaky_relu_", "aten.elu_", "aten.mish_",
)  # fmt: skip
def _activation_in_place(x: Tensor, *numbers: Any) -> Any:
    if x.is_meta and x.is_floating_point():
        return x
    return NotImplemented


@_shape_of("aten.add", "aten.mul", "aten.sub", "aten.div")
def _arithmetic(first: Tensor, second: Any, **named: Any) -> Any:
    if not first.is_meta or not first.is_floating_point() or "rounding_mode" in named:
        return NotImplemented
    if isinstance(second, Tensor) and _broadcasts(first, second):
        return torch.empty_like(second)
    if _broadcasts(second, first):
        return torch.empty_like(first)
    return NotImplemented


@_shape_of("aten.add_", "aten.mul_", "aten.sub_", "aten.div_")
def _arithmetic_in_place(first: Tensor, second: Any, **named: Any) -> Any:
    if not first.is_meta:
        return NotImplemented
    is_integer = isinstance(second, int) and not isinstance(second, bool)
    if is_integer or _broadcasts(second, first):
        return first
    return NotImplemented


def _broadcasts(value: Any, to: Tensor) -> bool:
    """Tell whether a value is a number, or a tensor that is repeated along some axes to the shape of another."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and to.is_floating_point()
    if not value.is_meta or value.dtype != to.dtype or value.dim() != to.dim():
        return False
    sizes = zip(value.shape, to.shape, strict=True)
    return all(size in (1, broadcast_size) for size, broadcast_size in sizes)
