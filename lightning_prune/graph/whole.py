"""Functions that are followed as the operator that they come to, without PyTorch's way from the one to the other."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.graph.resized import SCALED

__all__ = ["WHOLE"]

_aten = torch.ops.aten
Called = tuple[Any, tuple[Any, ...], dict[str, Any]]  # an operator, and the arguments that it is called with


def _as_it_is(operator: Any, *args: Any, **kwargs: Any) -> Called:
    return operator, args, kwargs


def _add_in_place(*args: Any, **kwargs: Any) -> Called | None:
    is_plain = len(args) == 2 and not kwargs  # as batches are counted in training
    return (_aten.add_.Tensor, args, kwargs) if is_plain else None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Called | None:
    if isinstance(padding, str):
        return None
    lengths = [_listed(setting) for setting in (stride, padding, dilation)]
    given = input, weight, bias, *lengths, False, [0], groups
    return _aten.convolution.default, given, {}


def _listed(setting: int | Sequence[int]) -> list[int]:
    return [setting] if isinstance(setting, int) else list(setting)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Called:
    per_channel = weight, bias, running_mean, running_var
    given = input, *per_channel, training, momentum, eps
    return _aten.native_batch_norm.default, given, {}


def _activation(
    operator: Any,
    in_place: Any,
    input: Tensor,
    inplace: bool = False,
) -> Called:
    return in_place if inplace else operator, (input,), {}


def _hardtanh(
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Called:
    operator = _aten.hardtanh_.default if inplace else _aten.hardtanh.default
    return operator, (input, min_val, max_val), {}


WHOLE: dict[Any, Callable[..., Called | None]] = {
    functional.linear: partial(
        _as_it_is,
        _aten.linear.default,
    ),
    SCALED: partial(
        _as_it_is,
        _aten.scaled_dot_product_attention.default,
    ),
    Tensor.add_: _add_in_place,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    functional.batch_norm: _batch_norm,
    functional.hardtanh: _hardtanh,
    functional.relu: partial(
        _activation,
        _aten.relu.default,
        _aten.relu_.default,
    ),
    functional.silu: partial(
        _activation,
        _aten.silu.default,
        _aten.silu_.default,
    ),
    functional.hardswish: partial(
        _activation,
        _aten.hardswish.default,
        _aten.hardswish_.default,
    ),
}
