"""Inputs of layers: which positions of a weight consume which channels, and which of them are kept."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.pruning_plan import PruningPlan, Slice, plan_in_force

__all__ = ["Block", "wide_blocks"]


@dataclass(frozen=True)
class Block:
    """Channels along the axis of a weight that consumes them, with equally many positions each.

    Attributes:
        positions: (channels, positions of a channel) int64.
        kept: (kept channels,) int64, which of these channels are kept.
    """

    positions: Tensor
    kept: Tensor

    @property
    def is_wide(self) -> bool:
        """Whether each channel takes several positions, as those of flattened maps do."""
        return self.positions.shape[1] > 1

    def kept_positions_in(self, kept: Tensor) -> Tensor:
        """Return where the kept channels lie along the shorter axis: (kept channels, positions of a channel).

        Args:
            kept: (n,) int64 positions of the axis that are kept.
        """
        of_kept = self.positions[self.kept].to(kept.device)
        return torch.searchsorted(kept, of_kept)

    def rows(self, inputs: Tensor) -> Tensor:
        """Return what channels have at each of their positions: (n * positions of a channel, channels).

        Args:
            inputs: (n, positions of the axis).
        """
        by_position = inputs[:, self.positions.T]
        return by_position.flatten(0, 1)


def wide_blocks(model: nn.Module, plan: PruningPlan, name: str, axis: int) -> list[Block]:
    """Return the channels that take several positions each of an axis, those with equally many in one block.

    Args:
        model: The model, before the prune.
        plan: The channels to keep, about the original model.
        name: Name of a weight.
        axis: The axis along which it consumes channels.

    Returns:
        The blocks; none where groups cross, as heads and the channels of their values do: a position is then pruned
        with the channel of either, and no block has channels of equally many positions.
    """
    if _cross(plan, name, axis):
        return []
    earlier = plan_in_force(model) or PruningPlan()
    index = earlier.index().get(name, {}).get(axis)
    blocks_by_width = defaultdict(list)
    for group_name, group in plan.groups.items():
        slices = [one for one in group.slices if one.tensor == name and one.axis == axis]
        if not slices:
            continue
        before = earlier.groups.get(group_name)
        channels = torch.arange(group.size) if before is None else before.channels
        positions = _positions(slices, channels)
        if index is not None:
            positions = torch.searchsorted(index, positions)
        is_kept = torch.isin(channels, group.channels)
        width = positions.shape[1]
        blocks_by_width[width].append((positions, is_kept))
    return [_joined(found) for width, found in blocks_by_width.items() if width > 1]


def _cross(plan: PruningPlan, name: str, axis: int) -> bool:
    """Tell whether a position along an axis belongs to channels of more than one group."""
    taken: set[int] = set()
    for group in plan.groups.values():
        every = torch.arange(group.size)
        for one in group.slices:
            if one.tensor != name or one.axis != axis:
                continue
            positions = set(one.positions(every).tolist())
            if not taken.isdisjoint(positions):
                return True
            taken |= positions
    return False


def _positions(slices: Sequence[Slice], channels: Tensor) -> Tensor:
    """Return the positions of channels in several slices: (channels, positions of a channel)."""
    by_slice = []
    for one in slices:
        positions = one.positions(channels)
        by_slice.append(positions.view(len(channels), -1))
    return torch.cat(by_slice, 1)


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> Block:
    """Join the channels of several groups."""
    positions, is_kept = zip(*found, strict=True)
    kept = torch.cat(is_kept).nonzero()
    return Block(torch.cat(positions), kept[:, 0])
