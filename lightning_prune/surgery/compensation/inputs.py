"""Inputs of layers: which positions of a weight consume which channels, and which of them are kept."""

from collections import Counter, defaultdict
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

    There is none where groups cross, as heads and the values in them do: what lies there is taken one by one, and so are
    channels that lie in several places, as those of all heads.

    Args:
        model: The model, before the prune.
        plan: The channels to keep, about the original model.
        name: Name of a weight.
        axis: The axis along which it consumes channels.
    """
    earlier = plan_in_force(model) or PruningPlan()
    index = earlier.index().get(name, {}).get(axis)
    blocks_by_width = defaultdict(list)
    groups_at: Counter[int] = Counter()
    for group_name, group in plan.groups.items():
        slices = [one for one in group.slices if one.tensor == name and one.axis == axis]
        if not slices:
            continue
        every = _positions(slices, torch.arange(group.size))
        groups_at.update(every.flatten().tolist())
        if all(one.width == 1 for one in slices):
            continue
        before = earlier.groups.get(group_name)
        channels = torch.arange(group.size) if before is None else before.channels
        positions = _positions(slices, channels)
        if index is not None:
            positions = torch.searchsorted(index, positions)
        is_kept = torch.isin(channels, group.channels)
        width = positions.shape[1]
        blocks_by_width[width].append((positions, is_kept))
    if max(groups_at.values(), default=0) > 1:
        return []
    return [_joined(found) for width, found in blocks_by_width.items() if width > 1]


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
