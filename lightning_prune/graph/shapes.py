"""Output shapes of the operators that networks spend most of their calls on.

PyTorch knows the shape of every output, but finds it in Python code that takes up to milliseconds a call. A function
here returns an output without data, or NotImplemented wherever its arguments are not the plain case.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPES"]

SHAPES: dict[str, Callable[..., Any]] = {}


def _on_meta(*operators: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            SHAPES[f"aten.{operator}"] = function
        return function

    return register


@_on_meta("convolution")
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
    fits = x.dim() == weight.dim() and x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    fits = fits and (bias is None or bias.shape[0] == weight.shape[0])
    if not fits or transposed or not x.is_meta or x.dtype != weight.dtype:
        return NotImplemented
    axes = x.dim() - 2
    stride, padding, dilation = (list(v) * axes if len(v) == 1 else v for v in (stride, padding, dilation))
    spatial = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    if min(spatial) < 1:
        return NotImplemented
    return x.new_empty((x.shape[0], weight.shape[0], *spatial))


@_on_meta("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
def _batch_norm(x: Tensor, *stored: Any) -> Any:
    known = [t for t in stored if isinstance(t, Tensor)]
    if not x.is_meta or x.dim() < 2 or any(t.shape != x.shape[1:2] or t.dtype != x.dtype for t in known):
        return NotImplemented
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


@_on_meta(
    "relu", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu", "mish"
)
def _activation(x: Tensor, *numbers: Any, **named: Any) -> Any:
    return torch.empty_like(x) if x.is_meta and x.is_floating_point() else NotImplemented


@_on_meta("relu_", "hardtanh_", "silu_", "hardswish_", "hardsigmoid_", "sigmoid_", "leaky_relu_", "elu_", "mish_")
def _activation_in_place(x: Tensor, *numbers: Any) -> Any:
    return x if x.is_meta and x.is_floating_point() else NotImplemented


@_on_meta("add", "mul", "sub", "div")
def _arithmetic(first: Tensor, second: Any, **named: Any) -> Any:
    if not first.is_meta or not first.is_floating_point() or "rounding_mode" in named:
        return NotImplemented
    if isinstance(second, Tensor) and _fits(first, second):
        return torch.empty_like(second)
    return torch.empty_like(first) if _fits(second, first) else NotImplemented


@_on_meta("add_", "mul_", "sub_", "div_")
def _arithmetic_in_place(first: Tensor, second: Any, **named: Any) -> Any:
    counts = isinstance(second, int) and not isinstance(second, bool)
    return first if first.is_meta and (counts or _fits(second, first)) else NotImplemented


def _fits(value: Any, into: Tensor) -> bool:
    """Tell whether a value is a number, or a tensor that is repeated along some axes to the shape of another."""
    if isinstance(value, Tensor):
        alike = value.is_meta and value.dtype == into.dtype and value.dim() == into.dim()
        return alike and all(own in (1, size) for own, size in zip(value.shape, into.shape, strict=True))
    return isinstance(value, int | float) and into.is_floating_point()


@_on_meta("native_layer_norm")
def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    known = [t for t in (weight, bias) if t is not None]
    if not x.is_meta or list(x.shape[-len(shape) :]) != list(shape):
        return NotImplemented
    if any(list(t.shape) != list(shape) or t.dtype != x.dtype for t in known):
        return NotImplemented
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
