"""Slicing: a smaller copy of a tensor, of the kept positions along some axes, in its memory format."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["KeptByAxis", "replace_data", "run_length", "take"]

KeptByAxis = Mapping[int, Tensor]
"""(n,) int64 positions to keep, ascending, by axis; other axes keep all."""

_CHUNK = 1_000_000  # numbers; larger tensors are copied some rows at a time


def take(tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Copy the kept positions of a tensor.

    Args:
        tensor: The tensor, sparse or not.
        kept: The positions to keep.

    Example:
        >>> take(torch.arange(6).reshape(2, 3), {1: torch.tensor([0, 2])})
        tensor([[0, 2],
                [3, 5]])
    """
    device = tensor.device
    kept = {axis: kept[axis].to(device) for axis in sorted(kept)}
    if tensor.is_sparse:
        return _selected(tensor, kept)
    if tensor.numel() > _CHUNK:
        return _selected_in_chunks(tensor, kept)
    selected = _selected(tensor, kept)
    return selected.contiguous(memory_format=_memory_format(tensor))


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer other data, of another shape; it stays the same object."""
    # Autograd may keep a node that accumulates the gradient of this parameter and remembers its shape. It is made anew
    # when the data changes its type, not when it changes its shape, hence the step over another type: one that every
    # device has, which float64 is not.
    other_type = torch.float16
    if tensor.dtype == other_type:
        other_type = torch.float32
    tensor.data = torch.empty(0, dtype=other_type, device=tensor.device)
    tensor.data = data


def _selected(tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Select along one axis after the other: rows first, which are cheapest to copy, so that less is to do after."""
    for axis, index in kept.items():
        tensor = tensor.index_select(axis, index)
    return tensor


def _selected_in_chunks(tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Select some rows at a time: of a large tensor, only what is kept is ever in memory beside it."""
    selected = _empty(tensor, kept)
    columns = [_Columns(axis, index, tensor.shape[axis]) for axis, index in kept.items() if axis != 0]
    row_size = tensor.numel() // len(tensor)
    rows_in_chunk = max(1, _CHUNK // row_size)
    for start in range(0, len(selected), rows_in_chunk):
        rows = slice(start, start + rows_in_chunk)
        chunk = _kept_rows(tensor, kept, rows)
        for columns_of_axis in columns:
            chunk = columns_of_axis.selected(chunk)
        selected[rows] = chunk
    return selected


def _kept_rows(tensor: Tensor, kept: KeptByAxis, rows: slice) -> Tensor:
    """Return some of the kept rows of a tensor."""
    if 0 not in kept:
        return tensor[rows]
    index = kept[0]
    return tensor.index_select(0, index[rows])


class _Columns:
    """The kept positions of an axis, as runs of neighbours that are copied as one.

    Args:
        axis: The axis.
        index: (n,) int64 positions to keep.
        size: Length of the axis.
    """

    def __init__(self, axis: int, index: Tensor, size: int) -> None:
        self.axis = axis
        self.run_length = run_length(index, size)
        self.runs = index[:: self.run_length] // self.run_length

    def selected(self, tensor: Tensor) -> Tensor:
        """Return the kept positions of a tensor along the axis."""
        if self.run_length == 1:
            return tensor.index_select(self.axis, self.runs)
        in_runs = tensor.contiguous().unflatten(self.axis, (-1, self.run_length))  # (..., runs, run length, ...)
        kept_runs = in_runs.index_select(self.axis, self.runs)
        return kept_runs.flatten(self.axis, self.axis + 1)


def run_length(index: Tensor, size: int) -> int:
    """Return the greatest length such that runs of that many neighbouring positions are kept or pruned together.

    Args:
        index: (n,) int64 positions that are kept.
        size: Length of the axis.

    Example:
        >>> run_length(torch.tensor([0, 1, 4, 5, 6, 7]), size=8)
        2
    """
    gaps = (index.diff() != 1).nonzero()[:, 0]  # positions in the index that a gap follows
    run_starts = index[gaps + 1].tolist()
    run_ends = (index[gaps] + 1).tolist()
    first = int(index[0])
    end = int(index[-1]) + 1
    return math.gcd(size, first, end, *run_starts, *run_ends)


def _empty(tensor: Tensor, kept: KeptByAxis) -> Tensor:
    """Return room for the kept positions of a tensor, in its precision and memory format."""
    shape = list(tensor.shape)
    for axis, index in kept.items():
        shape[axis] = len(index)
    return torch.empty(
        shape,
        dtype=tensor.dtype,
        device=tensor.device,
        memory_format=_memory_format(tensor),
    )


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return torch.contiguous_format
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
