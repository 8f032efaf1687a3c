"""Slices: the positions of the channels of a group in a tensor, written as a start, a step and a width."""

import numpy as np

from lightning_prune.graph.slots import Slot
from lightning_prune.pruning_plan import Slice

__all__ = ["slices_of"]


def slices_of(slot: Slot, positions: np.ndarray) -> list[Slice]:
    """Write the positions of channels as slices.

    Args:
        slot: Where they lie.
        positions: (channels, positions of a channel) where each channel lies along the axis of the slot.

    Returns:
        A slice with a regular step for each run of neighbouring positions; one slice with a table where there is no
        such step.

    Example:
        >>> slices_of(Slot("conv.weight", 0, start=1, size=4), np.array([[0, 1], [2, 3]]))
        [Slice(tensor='conv.weight', axis=0, start=0, step=2, width=2, table=())]
    """
    channels, width = positions.shape
    start = int(positions[0, 0])
    neighbours = np.arange(start, start + channels)
    if width == 1 and np.array_equal(positions[:, 0], neighbours):
        return [Slice(slot.tensor, slot.axis, start)]  # the most frequent case
    distances = np.diff(positions[0])  # between the positions of the first channel
    run_starts = np.flatnonzero(distances != 1) + 1
    slices = []
    for run in np.split(positions, run_starts, axis=1):  # (channels, positions in the run)
        slice_of_run = _regular_slice(slot, run)
        if slice_of_run is None:
            return [_table_slice(slot, positions)]
        slices.append(slice_of_run)
    return slices


def _regular_slice(slot: Slot, run: np.ndarray) -> Slice | None:
    channels, width = run.shape
    first_column = run[:, 0]
    start = int(first_column[0])
    step = 1
    if channels > 1:
        step = int(first_column[1]) - start
    if step <= 0:
        return None
    expected_first_column = start + step * np.arange(channels)
    expected_run = expected_first_column[:, None] + np.arange(width)  # (channels, width)
    if not np.array_equal(expected_run, run):
        return None
    return Slice(slot.tensor, slot.axis, start, step, width)


def _table_slice(slot: Slot, positions: np.ndarray) -> Slice:
    rows = positions.tolist()
    table = tuple(map(tuple, rows))
    return Slice(slot.tensor, slot.axis, table=table)
