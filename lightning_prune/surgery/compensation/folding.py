"""Folding: the weights that consumed a pruned channel go to the channels that are kept, by one linear map a layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.copies import copy_on
from lightning_prune.surgery.compensation.inputs import Block, blocks_of
from lightning_prune.surgery.compensation.least_squares import Moments, fit_moments
from lightning_prune.surgery.compensation.lockstep import Run
from lightning_prune.surgery.compensation.operators import Linear, Step
from lightning_prune.surgery.compensation.runs import Watch
from lightning_prune.surgery.compensation.sampling import positions_of
from lightning_prune.surgery.compensation.survey import names_of
from lightning_prune.surgery.compensation.work import Work

__all__ = [
    "channel_map",
    "fold",
    "folded_weight",
    "inputs_of",
    "rows_of",
    "weight_with_kept_outputs",
]


@torch.no_grad()
def fold(work: Work, names: Sequence[str], batches: Iterable[Any], run: Run) -> None:
    """Fold some weights of the pruned network, by what their layers are given in the network before the prune.

    Args:
        work: What the compensation works with.
        names: Names of the weights.
        batches: The batches.
        run: Runs a model on one.
    """
    if not names:
        return
    blocks = {}
    for name in names:
        axis = work.survey.in_axis[name]
        blocks[name] = blocks_of(work.model, work.plan, name, axis, work.kept[name])
    copied = copy_on(work.model, named_tensors(work.model))
    moments = _input_moments(copied, batches, run, blocks)
    for name in names:
        _fold_weight(work, name, blocks[name], moments[name])


def _fold_weight(work: Work, name: str, blocks: Sequence[Block], moments: Sequence[Moments]) -> None:
    """Fold one weight, and the means into the bias that goes with it, unless normalisation takes them up."""
    axis = work.survey.in_axis[name]
    assert axis is not None
    bias = work.survey.bias_of.get(name)
    is_normalised = name in work.survey.normalised
    intercept = is_normalised or bias is not None
    maps = [channel_map(found, block.kept, intercept) for block, found in zip(blocks, moments, strict=True)]
    weight = weight_with_kept_outputs(work, name, axis)
    work.uncompensated[name] = work.tensors[name].detach().clone()
    work.write(work.tensors[name], folded_weight(weight, axis, work.kept[name][axis], blocks, maps))
    if bias is None or is_normalised:
        return
    constant = work.tensors[bias].double()
    for block, found, of_kept in zip(blocks, moments, maps, strict=True):
        unexplained = found.mean_y - of_kept @ found.mean_x  # (channels,)
        consumed = _taps(weight, axis)[:, block.positions].double()
        constant = constant + consumed.sum((2, 3)) @ unexplained
    work.write(work.tensors[bias], constant)


def weight_with_kept_outputs(work: Work, name: str, in_axis: int) -> Tensor:
    """Return a weight before the prune, less the outputs that are pruned."""
    weight = named_tensors(work.model)[name].detach()
    for axis, kept in work.kept.get(name, {}).items():
        if axis != in_axis:
            weight = weight.index_select(axis, kept.to(weight.device))
    return weight


def _input_moments(
    model: nn.Module, batches: Iterable[Any], run: Run, blocks: Mapping[str, Sequence[Block]]
) -> dict[str, list[Moments]]:
    """Return the moments of the channels that layers consume: of the kept ones, and with these of all.

    Args:
        model: A copy of the network before the prune.
        batches: The batches.
        run: Runs the model on one.
        blocks: The input channels of each layer, by the name of its weight.
    """
    found: dict[str, list[Moments]] = {}

    def note(name: str, step: Step, proceed: Any) -> Any:
        if isinstance(step, Linear) and name in blocks:
            [chosen] = inputs_of([step.x], share=1, seed=0)
            for number, block in enumerate(blocks[name]):
                channels = rows_of(chosen, block.positions)
                kept = channels[:, block.kept]
                if number == len(found.setdefault(name, [])):
                    found[name].append(Moments.like(kept, channels))
                found[name][number].add(kept, channels)
        return proceed()

    with Watch(names_of(named_tensors(model)), note):
        for batch in batches:
            run(model, batch)
    return found


def inputs_of(several: Sequence[Tensor], share: int, seed: int) -> list[Tensor]:
    """Return what is given to layers at some positions, the same of all: each (n, in_channels).

    Args:
        several: Inputs of equal shape but for their channels, each (samples, in_channels, *spatial).
        share: Among how many batches the memory is shared.
        seed: What the choice of positions is drawn with.
    """
    by_position = [x.flatten(2) if x.dim() > 2 else x[:, :, None] for x in several]
    samples, _, positions = by_position[0].shape
    numbers = sum(x.shape[1] for x in several)
    sample, position = positions_of(samples, positions, numbers, share, seed, several[0].device)
    return [x[sample, :, position] for x in by_position]


def rows_of(inputs: Tensor, positions: Tensor) -> Tensor:
    """Return what channels have at each of their positions: (n * positions of a channel, channels).

    Args:
        inputs: (n, positions of the axis).
        positions: (channels, positions of a channel).
    """
    return inputs[:, positions.T].flatten(0, 1)


def channel_map(moments: Moments, kept: Tensor, intercept: bool) -> Tensor:
    """Return the map from the kept channels to all that fits moments: (channels, kept channels) float64.

    Args:
        moments: What `input_moments` returned, or the same with other inputs in the place of the kept channels.
        kept: (kept channels,) int64.
        intercept: Whether a bias takes up the means.
    """
    prior = moments.xx.new_zeros(len(moments.shift_y), len(kept))
    prior[kept, torch.arange(len(kept))] = 1
    return fit_moments(moments, prior, intercept)


def folded_weight(
    weight: Tensor, axis: int, kept: Tensor | None, blocks: Sequence[Block], maps: Sequence[Tensor]
) -> Tensor:
    """Return a weight, shorter along the axis of its inputs, that reads the kept channels as it read all of them.

    Args:
        weight: The weight before the prune, less the outputs that are pruned.
        axis: The axis along which it consumes channels.
        kept: (n,) int64 positions that are kept of it; None for all.
        blocks: The channels that lie there.
        maps: What `channel_map` returned for each of them.
    """
    taps = _taps(weight, axis)
    if kept is None:
        kept = torch.arange(weight.shape[axis])
    kept = kept.to(weight.device)
    folded = taps[:, kept].clone()
    for block, of_kept in zip(blocks, maps, strict=True):
        consumed = taps[:, block.positions]  # (out, channels, positions of a channel, taps)
        mixed = torch.einsum("ocwt,ck->okwt", consumed, of_kept.to(weight.dtype))
        now = torch.searchsorted(kept, block.positions[block.kept].to(kept.device))
        folded[:, now] = mixed
    shape = list(weight.movedim(axis, 1).shape)
    shape[1] = len(kept)
    return folded.reshape(shape).movedim(1, axis)


def _taps(weight: Tensor, axis: int) -> Tensor:
    """Bring a weight into the form (out_channels, in_channels, taps)."""
    inputs_second = weight.movedim(axis, 1)
    return inputs_second[:, :, None] if weight.dim() == 2 else inputs_second.flatten(2)
