"""Folding: what consumed a pruned channel consumes the kept ones in its place, by one linear map a layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.copies import shared_twin
from lightning_prune.surgery.compensation.inputs import Block
from lightning_prune.surgery.compensation.least_squares import Moments, fit_apart, set_aside
from lightning_prune.surgery.compensation.lockstep import Run
from lightning_prune.surgery.compensation.operators import Step
from lightning_prune.surgery.compensation.runs import Watch
from lightning_prune.surgery.compensation.sampling import at_places, places_in
from lightning_prune.surgery.compensation.survey import names_of
from lightning_prune.surgery.compensation.work import Work

__all__ = ["channel_map", "fold", "folded_weight", "keeping"]

Apart = tuple[Moments, Moments]
"""Of samples that are fitted to, and of those that are set aside."""

Blocks = Mapping[str, Sequence[Block]]
"""The input channels of layers, by the names of their weights."""


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
    blocks = {name: work.blocks(name) for name in names}
    copied = shared_twin(work.model, named_tensors(work.model))
    moments = _input_moments(copied, batches, run, blocks)
    for name in names:
        _fold_weight(work, name, blocks[name], moments[name])


def _fold_weight(work: Work, name: str, blocks: Sequence[Block], moments: Sequence[Apart]) -> None:
    """Fold one weight, and the means into the bias that goes with it."""
    axis = work.survey.in_axis[name]
    assert axis is not None
    intercept = work.takes_up_means(name)
    maps = []
    for block, found in zip(blocks, moments, strict=True):
        of_kept = channel_map(*found, block.kept, intercept)
        maps.append(of_kept)
    weight = work.with_kept_outputs(name)
    kept = work.kept_along(name, axis)
    folded = folded_weight(weight, axis, kept, blocks, maps)
    uncompensated = work.tensors[name]
    work.uncompensated[name] = uncompensated.detach().clone()
    work.write(uncompensated, folded)
    bias = work.bias_taking_means(name)
    if bias is None:
        return
    constant = bias.double()
    fitted_to = [found for found, _ in moments]
    for block, seen, of_kept in zip(blocks, fitted_to, maps, strict=True):
        unexplained = seen.mean_y - of_kept @ seen.mean_x  # (channels,)
        taps = _taps(weight, axis)
        consumed = taps[:, block.positions].double()
        by_channel = consumed.sum((2, 3))
        constant = constant + by_channel @ unexplained
    work.write(bias, constant)


def _input_moments(model: nn.Module, batches: Iterable[Any], run: Run, blocks: Blocks) -> dict[str, list[Apart]]:
    """Return the moments of the channels that layers consume: of the kept ones, and with these of all."""
    found: dict[str, list[Apart]] = {name: [] for name in blocks}
    earlier = 0  # samples, in batches before
    samples = 0

    def note(name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        if name in blocks:
            add(name, step.x)
        return proceed()

    def add(name: str, x: Tensor) -> None:
        nonlocal samples
        samples = max(samples, len(x))
        places = places_in(x, x.shape[1], share=1, seed=0)
        inputs = at_places(x, places)
        is_aside = set_aside(places.sample + earlier)
        moments = found[name]
        for number, block in enumerate(blocks[name]):
            channels = block.rows(inputs)
            kept = channels[:, block.kept]
            if number == len(moments):
                like = Moments.like(kept, channels)
                moments.append((like, like.empty()))
            parts = is_aside.repeat_interleave(len(kept) // len(is_aside))
            for part, some in zip((~parts, parts), moments[number], strict=True):
                some.add(kept[part], channels[part])

    names = names_of(named_tensors(model))
    with Watch(names, note):
        for batch in batches:
            run(model, batch)
            earlier += samples
            samples = 0
    return found


def channel_map(moments: Moments, aside: Moments, kept: Tensor, intercept: bool) -> Tensor:
    """Return the map from the kept channels to all that fits moments: (channels, kept channels) float64.

    Args:
        moments: Of the kept channels, and with these of all.
        aside: The same of samples that are set aside where there are few; they are joined otherwise.
        kept: (kept channels,) int64.
        intercept: Whether something behind takes up a constant.
    """
    channels = len(moments.yx)
    prior = keeping(kept.to(moments.yx.device), channels)
    return fit_apart(moments, aside, prior, intercept)


def keeping(kept: Tensor, channels: int) -> Tensor:
    """Return the map that leaves kept channels as they are: (channels, kept channels) float64.

    Args:
        kept: (kept channels,) int64.
        channels: How many there are.
    """
    every = torch.eye(channels, dtype=torch.float64, device=kept.device)
    return every[:, kept]


def folded_weight(weight: Tensor, axis: int, kept: Tensor, blocks: Sequence[Block], maps: Sequence[Tensor]) -> Tensor:
    """Return a weight, shorter along the axis of its inputs, that consumes the kept channels as it consumed all.

    Args:
        weight: The weight before the prune, less the outputs that are pruned.
        axis: The axis along which it consumes channels.
        kept: (n,) int64 positions of that axis that are kept.
        blocks: The channels that lie there.
        maps: What `channel_map` returned for each of them.
    """
    taps = _taps(weight, axis)
    folded = taps.index_select(1, kept)
    for block, of_kept in zip(blocks, maps, strict=True):
        consumed = taps[:, block.positions]  # (out_channels, channels, positions of a channel, taps)
        shares = of_kept.to(weight.dtype)
        positions = block.kept_positions_in(kept)
        folded[:, positions] = torch.einsum("ocwt,ck->okwt", consumed, shares)
    inputs_second = weight.movedim(axis, 1)
    shape = list(inputs_second.shape)
    shape[1] = len(kept)
    inputs_second = folded.reshape(shape)
    return inputs_second.movedim(1, axis)


def _taps(weight: Tensor, axis: int) -> Tensor:
    """Bring a weight into the form (out_channels, in_channels, taps)."""
    inputs_second = weight.movedim(axis, 1)
    if weight.dim() == 2:
        return inputs_second[:, :, None]
    return inputs_second.flatten(2)
