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
    if width == 1 and (positions[:, 0] == neighbours).all():
        return [Slice(slot.tensor, slot.axis, start)]  # the most frequent case
    starts = positions[0]  # of the first channel
    run_starts = np.append(0, np.flatnonzero(np.diff(starts) != 1) + 1)
    run_widths = np.diff(run_starts, append=width)
    steps = np.ones(len(run_starts), dtype=int)
    if channels > 1:
        steps = (positions[1] - starts)[run_starts]
    expected = starts + np.repeat(steps, run_widths) * np.arange(channels)[:, None]
    if (steps <= 0).any() or not np.array_equal(expected, positions):
        return [_table_slice(slot, positions)]
    runs = np.stack([starts[run_starts], steps, run_widths], axis=1)
    return [Slice(slot.tensor, slot.axis, *run) for run in runs.tolist()]


def _table_slice(slot: Slot, positions: np.ndarray) -> Slice:
    rows = positions.tolist()
    table = tuple(map(tuple, rows))
    return Slice(slot.tensor, slot.axis, table=table)
