"""Operators that compensation knows: layers that read channels by a weight, and normalisation by running statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.surgery.compensation.sampling import Places

__all__ = ["READ_CALL", "Linear", "Normalisation", "Step", "as_matrix", "from_matrix"]


@dataclass(frozen=True)
class Linear:
    """One call of a convolution, transposed or not, or of a linear layer, which counts as one without a kernel.

    Attributes:
        x: (samples, in_channels, *spatial).
        weight: The weight as it was given.
        bias: The bias as it was given, or None.
        stride: By spatial axis.
        padding: Before the first position, by spatial axis.
        dilation: By spatial axis.
        groups: Number of convolution groups.
        transposed: Whether it is a transposed convolution.
        shaped: Brings an output into the form (samples, out_channels, *spatial).
        given: The input as it was given.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1
    transposed: bool = False
    shaped: Callable[[Tensor], Tensor] = torch.detach
    given: Tensor | None = None

    @property
    def state(self) -> Tensor:
        """The tensor that tells which layer this is."""
        return self.weight

    @property
    def in_axis(self) -> int:
        """The axis of the weight that consumes channels."""
        return 0 if self.transposed else 1

    @property
    def depthwise(self) -> bool:
        """Whether each convolution group has a single input, with nothing to be computed from."""
        return self.groups > 1 and self.x.shape[1] == self.groups

    @property
    def taps(self) -> int:
        """Number of taps of the kernel; 1 of a linear layer."""
        return self.weight.shape[2:].numel()

    def windows(self, places: Places, out_shape: Sequence[int]) -> Tensor:
        """Return what the layer multiplies its weight by at some places of its output, zeros of padding included.

        Args:
            places: The places.
            out_shape: Lengths of the spatial axes of the output.

        Returns:
            (n, taps, in_channels).
        """
        by_place = self.x.movedim(1, -1).flatten(0, -2)  # (samples * positions, in_channels)
        index = places.sample[:, None]
        if self.x.dim() == 2:
            return by_place[index]
        is_inside = torch.ones_like(index, dtype=torch.bool)  # (n, taps of the axes so far)
        for axis, outputs in enumerate(torch.unravel_index(places.position, tuple(out_shape))):
            size = self.x.shape[axis + 2]
            inputs, is_input = self._inputs_along(axis, outputs)
            is_input &= (inputs >= 0) & (inputs < size)
            inputs = inputs.clamp(0, size - 1)
            index = index[:, :, None] * size + inputs[:, None]
            index = index.flatten(1)
            is_inside = is_inside[:, :, None] & is_input[:, None]
            is_inside = is_inside.flatten(1)
        return by_place[index].mul_(is_inside[:, :, None])

    def _inputs_along(self, axis: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return where along an axis each tap lies for some outputs, and whether it lies on an input: (n, taps)."""
        if not self.stride:  # a linear layer, which has no kernel
            inputs = outputs[:, None]
            return inputs, torch.ones_like(inputs, dtype=torch.bool)
        stride = self.stride[axis]
        padding = self.padding[axis]
        taps = self.weight.shape[axis + 2]
        offsets = torch.arange(taps, device=outputs.device) * self.dilation[axis]
        if not self.transposed:
            inputs = outputs[:, None] * stride - padding + offsets
            return inputs, torch.ones_like(inputs, dtype=torch.bool)
        scaled = outputs[:, None] + padding - offsets
        inputs = scaled.div(stride, rounding_mode="floor")
        return inputs, scaled % stride == 0


@dataclass(frozen=True)
class Normalisation:
    """One call of batch normalisation by running statistics.

    Attributes:
        x: (samples, channels, *spatial).
        mean: (channels,) running mean.
        variance: (channels,) running variance.
        eps: What is added to the variance.
        scale: (channels,) affine weight, or None.
    """

    x: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    scale: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """The input as it was given."""
        return self.x

    @property
    def state(self) -> Tensor:
        """The tensor that tells which layer this is."""
        return self.mean


Step = Linear | Normalisation


def as_matrix(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return a weight as (groups, out_channels of a group, taps * in_channels of a group), taps first.

    Args:
        weight: The weight of a convolution or linear layer.
        groups: Number of convolution groups.
        transposed: Whether the convolution is transposed.
    """
    taps_last = weight[:, :, None] if weight.dim() == 2 else weight.flatten(2)
    by_group = taps_last.unflatten(0, (groups, -1))
    order = (0, 2, 3, 1) if transposed else (0, 1, 3, 2)
    return by_group.permute(order).flatten(2)


def from_matrix(matrix: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return what `as_matrix` has made, or another in its place, in the shape of the weight."""
    inner = weight.shape[0] // groups if transposed else weight.shape[1]
    by_tap = matrix.unflatten(2, (-1, inner))  # (groups, out, taps, in)
    order = (0, 3, 1, 2) if transposed else (0, 1, 3, 2)
    return by_tap.permute(order).reshape(weight.shape)


# -- reading the arguments of calls ------------------------------------------------------------------------------------


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Linear:
    rank = weight.dim() - 2
    dilation = _by_axis(dilation, rank)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = zip(weight.shape[2:], dilation, strict=True)
        padding = [apart * (taps - 1) // 2 for taps, apart in spans]
    return _over_windows(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Linear:
    whole = _over_windows(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return replace(whole, transposed=True)


def _over_windows(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Linear:
    """Return the call of a convolution, transposed or not."""
    rank = weight.dim() - 2
    shaped = _shaped_as_convolution(rank)
    return Linear(
        x=shaped(x),
        weight=weight,
        bias=bias,
        stride=_by_axis(stride, rank),
        padding=_by_axis(padding, rank),
        dilation=_by_axis(dilation, rank),
        groups=groups,
        shaped=shaped,
        given=x,
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(
        x=_channels_second(input),
        weight=weight,
        bias=bias,
        shaped=_channels_second,
        given=input,
    )


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *others: Any,
) -> Normalisation | None:
    if training or running_mean is None or running_var is None:
        return None
    return Normalisation(
        x=input,
        mean=running_mean,
        variance=running_var,
        eps=eps,
        scale=weight,
    )


def _by_axis(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _shaped_as_convolution(rank: int) -> Callable[[Tensor], Tensor]:
    """Return what adds an axis of samples where there is none."""
    return lambda x: x if x.dim() == rank + 2 else x[None]


def _channels_second(x: Tensor) -> Tensor:
    """Bring (samples, ..., channels) into the form (samples, channels, ...)."""
    return x.movedim(-1, 1) if x.dim() > 1 else x[None]


READ_CALL: dict[Any, Callable[..., Step | None]] = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
}
"""What reads the arguments of a function; None for a call that there is nothing to say about."""
