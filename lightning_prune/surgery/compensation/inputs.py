"""Inputs of layers: which positions of a weight consume which channels, and which of them are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, Slice, plan_in_force
from lightning_prune.surgery.compensation.operators import Linear

__all__ = ["Block", "blocks_of", "kept_outputs"]


@dataclass(frozen=True)
class Block:
    """Channels that each take several positions of an input axis, as those of flattened maps do.

    Attributes:
        positions: (channels, positions of a channel) int64.
        kept: (kept channels,) int64, which of these channels are kept.
    """

    positions: Tensor
    kept: Tensor


def blocks_of(model: nn.Module, plan: PruningPlan, name: str, axis: int, kept: Mapping[int, Tensor]) -> list[Block]:
    """Return the channels that a weight consumes: several positions of each, where maps were flattened, or one.

    Args:
        model: The model, before the prune.
        plan: The channels to keep, about the original model.
        name: Name of the weight.
        axis: The axis along which it consumes channels.
        kept: The positions to keep of the weight, by axis.
    """
    weight = named_tensors(model)[name]
    wide = _wide_blocks(model, plan, name, axis) if weight.dim() == 2 else []
    if wide:
        return wide
    inputs = torch.arange(weight.shape[axis])
    return [Block(inputs[:, None], kept.get(axis, inputs))]


def _wide_blocks(model: nn.Module, plan: PruningPlan, name: str, axis: int) -> list[Block]:
    """Return the channels that take several positions each of an axis; channels of equal width in one block."""
    earlier = plan_in_force(model) or PruningPlan()
    index = earlier.index().get(name, {}).get(axis)
    tables: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for group_name, group in plan.groups.items():
        before = earlier.groups.get(group_name)
        channels = before.channels if before else torch.arange(group.size)
        slices = [one for one in group.slices if one.tensor == name and one.axis == axis]
        if slices:
            table = torch.cat([_table(one, channels) for one in slices], 1)
            positions = table if index is None else torch.searchsorted(index, table)
            is_kept = torch.isin(channels, group.channels)
            tables.setdefault(table.shape[1], []).append((positions, is_kept))
    return [_joined(found) for width, found in tables.items() if width > 1]


def _joined(found: Sequence[tuple[Tensor, Tensor]]) -> Block:
    """Join the channels of several groups."""
    positions = torch.cat([of_group for of_group, _ in found])
    is_kept = torch.cat([of_group for _, of_group in found])
    return Block(positions, is_kept.nonzero()[:, 0])


def _table(of_group: Slice, channels: Tensor) -> Tensor:
    """Return (channels, positions of a channel)."""
    return of_group.positions(channels).view(len(channels), -1)


def kept_outputs(step: Linear, weight: Tensor, kept: Mapping[int, Tensor]) -> Tensor | None:
    """Return which output channels of a layer are kept, as (n,) int64; None for all.

    Args:
        step: A call of the layer before the prune.
        weight: Its weight.
        kept: The positions to keep of the weight, by axis.
    """
    if not step.transposed:
        return kept.get(0)
    if step.groups == 1:
        return kept.get(1)
    if 0 not in kept:
        return None
    inner = weight.shape[0] // step.groups
    outer = weight.shape[1]
    kept_groups = kept[0][::inner] // inner
    return (kept_groups[:, None] * outer + torch.arange(outer)).flatten()
