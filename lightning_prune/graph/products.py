"""Products of three tensors that are summed over some axes, as bilinear layers compute them."""

from typing import NamedTuple

from torch import Tensor

from lightning_prune.graph.records import Call

__all__ = ["AxisOf", "shared_axes"]


class AxisOf(NamedTuple):
    """An axis of a tensor."""

    tensor: Tensor
    axis: int


def shared_axes(call: Call) -> list[list[AxisOf]]:
    """Return, for each axis of a product, the tensors that have it; the others are repeated along it.

    Args:
        call: A call of ``aten._trilinear``: three tensors, and the axes that each of them lacks.
    """
    tensors = call.args[:3]
    lacking = call.args[3:6]
    axes = range(tensors[0].dim() + len(lacking[0]))
    shared: list[list[AxisOf]] = [[] for _ in axes]
    for tensor, lacked in zip(tensors, lacking, strict=True):
        own_axis = 0
        for axis in axes:
            if axis in lacked:
                continue
            one = AxisOf(tensor, own_axis)
            shared[axis].append(one)
            own_axis += 1
    return shared
