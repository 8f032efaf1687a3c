"""Convolutions: the arguments of a call that decide where channels lie."""

from typing import NamedTuple

from torch import Tensor

from lightning_prune.graph.tracer import Call

__all__ = ["Convolution"]


class Convolution(NamedTuple):
    """What a call of ``aten.convolution`` or ``torchvision.deform_conv2d`` was given.

    Attributes:
        x: (batch, in_channels, *spatial), or without a batch axis.
        weight: (out_channels, in_channels / groups, *kernel), transposed
            (in_channels, out_channels / groups, *kernel).
        bias: (out_channels,), or None.
        transposed: Whether it is a transposed convolution.
        groups: Number of convolution groups.
        is_plain: Whether its kernel goes from each position to the next, without gaps.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    groups: int
    is_plain: bool

    @classmethod
    def of(cls, call: Call) -> "Convolution":
        """Read the arguments of a call."""
        if call.name == "torchvision.deform_conv2d":
            x, weight, _, _, bias = call.args[:5]
            return cls(x, weight, bias, transposed=False, groups=call.args[11], is_plain=False)
        transposed = call.argument(6, "transposed", False)
        stride = call.argument(3, "stride", [1])
        return cls(
            x=call.args[0],
            weight=call.args[1],
            bias=call.argument(2, "bias"),
            transposed=transposed,
            groups=call.argument(8, "groups", 1),
            is_plain=not transposed and set(stride) == {1},
        )

    @property
    def channel_axis(self) -> int:
        """The axis of channels in the input and the output: 1, or 0 without a batch axis."""
        return self.x.dim() - self.weight.dim() + 1

    @property
    def in_channels(self) -> int:
        """Number of channels of the input."""
        return self.x.shape[self.channel_axis]

    @property
    def in_axis(self) -> int:
        """The axis of the weight that consumes channels."""
        return 0 if self.transposed else 1

    @property
    def out_axis(self) -> int:
        """The axis of the weight that produces channels."""
        return 1 if self.transposed else 0
