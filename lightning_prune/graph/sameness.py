"""Sameness: the axes along which no position of a tensor differs from another, whatever their number.

A tensor that is made in some shape (zeros, noise), or expanded to it, has no positions of its own: where it meets
channels it has as many as there are, if its shape was read from them. Whether that is so shows in a smaller network.
"""

from collections.abc import Callable

from torch import Tensor

from lightning_prune.graph.records import Call

__all__ = ["SAMENESS", "clear_sameness", "same_along", "set_same_along"]

Sameness = Callable[[Call], frozenset[int]]  # the axes of the outputs along which all positions are the same
SAMENESS: dict[str, Sameness] = {}


def same_along(tensor: Tensor) -> frozenset[int]:
    """Return the axes along which all positions are the same; axes of one position may be absent.

    Example:
        >>> import torch
        >>> same_along(torch.rand(3, 1).expand(3, 4))
        frozenset({1})
    """
    found: frozenset[int] = getattr(tensor, "_same_along", frozenset())
    if not tensor.is_contiguous():
        strides = tensor.stride()
        found |= {axis for axis, stride in enumerate(strides) if stride == 0}
    return found


def set_same_along(tensor: Tensor, axes: frozenset[int]) -> None:
    """Say along which axes all positions of a tensor are the same, and that along others they are not."""
    if axes or hasattr(tensor, "_same_along"):
        tensor._same_along = axes  # type: ignore[attr-defined]


def clear_sameness(tensor: Tensor) -> None:
    """Say that the positions of a tensor, which was written to, differ along every axis."""
    set_same_along(tensor, frozenset())


def _all_axes(tensor: Tensor) -> frozenset[int]:
    return frozenset(range(tensor.dim()))


def _sameness_of(*operators: str) -> Callable[[Sameness], Sameness]:
    """Register what tells the sameness of what some operators return."""

    def register(function: Sameness) -> Sameness:
        for operator in operators:
            SAMENESS[f"aten.{operator}"] = function
        return function

    return register


@_sameness_of(
    "empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "normal", "new_empty", "new_empty_strided",
    "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like",
    "randn_like", "scalar_tensor", "fill_", "zero_", "normal_", "uniform_", "exponential_",
)  # fmt: skip
def _made(call: Call) -> frozenset[int]:
    """Every position is the same constant, or the same kind of noise."""
    return _all_axes(call.outputs[0])


@_sameness_of("clone", "detach", "alias", "_to_copy", "contiguous", "bernoulli", "bernoulli_", "native_dropout")
def _kept(call: Call) -> frozenset[int]:
    return same_along(call.given[0])


@_sameness_of(
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "slice", "select",
    "unbind", "split", "split_with_sizes", "chunk",
)  # fmt: skip
def _viewed(call: Call) -> frozenset[int]:
    """What is the same everywhere is so in every view."""
    x = call.given[0]
    output = call.outputs[0]
    same = same_along(x)
    is_same_everywhere = all(axis in same for axis, size in enumerate(x.shape) if size > 1)
    return _all_axes(output) if is_same_everywhere else frozenset()


@_sameness_of("repeat", "tile", "repeat_interleave")
def _repeated(call: Call) -> frozenset[int]:
    """What has one position along an axis is the same along it when that is repeated.

    Several positions are not, though they may all be the same: channels need not be so many times as many.
    """
    x = call.given[0]
    output = call.outputs[0]
    added_axes = output.dim() - x.dim()
    sizes = [1] * added_axes + list(x.shape)
    same_before = {axis + added_axes for axis in same_along(x)}
    found = set()
    for axis, (before, after) in enumerate(zip(sizes, output.shape, strict=True)):
        if before == 1 or (before == after and axis in same_before):
            found.add(axis)
    return frozenset(found)
