"""Refitting of one weight, once both networks have come to its layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.folding import folded_weight, keeping
from lightning_prune.surgery.compensation.inputs import Block
from lightning_prune.surgery.compensation.least_squares import fit_samples
from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Linear, as_matrix, from_matrix
from lightning_prune.surgery.compensation.samples import Samples, samples_of, with_drift
from lightning_prune.surgery.compensation.sampling import at_places, places_in
from lightning_prune.surgery.compensation.work import Work
from lightning_prune.surgery.compensation_report import LayerError

__all__ = ["measure", "refit"]

_ENOUGH = 4  # samples for each input of a layer that consumes flattened maps
_TOLD = 1024  # windows that the error of a layer is measured on


def refit(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Give a weight the values with which its layer comes nearest to what it returned before the prune.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
    """
    layer = meetings[0].pruned
    assert isinstance(layer, Linear)
    if layer.depthwise:  # each channel has nothing but itself to be computed from
        return
    samples = samples_of(work, name, meetings)
    samples = with_drift(work, name, meetings, samples)
    before = work.tensors[name].detach().clone()
    weight = _fitted(work, name, meetings, samples)
    work.write(layer.weight, weight)
    bias = work.bias_taking_means(name)
    if bias is not None:
        windows = samples.windows.double()
        outputs = samples.outputs.double()
        mean = windows.mean(0, keepdim=True)
        [product] = _product(layer, weight.double(), mean)
        work.write(bias, outputs.mean(0) - product)
    work.report.errors[name] = _errors(work, name, layer, samples, before)


def measure(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Note how far a layer is from what it returned before the prune, with a weight that has been folded.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
    """
    layer = meetings[0].pruned
    assert isinstance(layer, Linear)
    samples = samples_of(work, name, meetings)
    before = work.uncompensated[name]
    work.report.errors[name] = _errors(work, name, layer, samples, before)


def _fitted(work: Work, name: str, meetings: Sequence[Meeting], samples: Samples) -> Tensor:
    """Return the weight that fits samples: folded, and then fitted tap by tap where positions share their weights."""
    layer = meetings[0].pruned
    assert isinstance(layer, Linear)
    before = work.tensors[name].detach()
    weight = before.double()
    blocks = work.blocks(name) if work.survey.in_axis[name] is not None else []
    is_wide = any(block.is_wide for block in blocks)
    if blocks and (is_wide or layer.taps > 1):
        weight = _folded(work, name, meetings, blocks)
    inputs = layer.x.shape[1]
    if is_wide and len(samples.windows) < _ENOUGH * inputs:  # too many inputs to be told apart
        return weight
    prior = as_matrix(weight, layer.groups, layer.transposed)
    fitted = _fit_by_group(samples, prior, work.takes_up_means(name))
    return from_matrix(fitted, before, layer.groups, layer.transposed)


def _fit_by_group(samples: Samples, prior: Tensor, intercept: bool) -> Tensor:
    """Fit each convolution group on its own.

    Args:
        samples: The samples.
        prior: (groups, out_channels of a group, inputs of a group).
        intercept: Whether something behind takes up a constant.
    """
    groups = len(prior)
    windows = samples.windows.unflatten(2, (groups, -1))
    outputs = samples.outputs.unflatten(1, (groups, -1))
    fitted = []
    for group in range(groups):
        inputs = windows[:, :, group].flatten(1)
        of_group = fit_samples(inputs, outputs[:, group], prior[group], intercept, samples.owners)
        fitted.append(of_group)
    return torch.stack(fitted)


def _folded(work: Work, name: str, meetings: Sequence[Meeting], blocks: Sequence[Block]) -> Tensor:
    """Fold a weight by maps from the kept channels, as they are now, to all channels as they were."""
    axis = work.survey.in_axis[name]
    assert axis is not None
    kept = work.kept_along(name, axis)
    intercept = work.takes_up_means(name)
    maps = []
    for block in blocks:
        now, before, owners = _channels(meetings, block, kept)
        prior = keeping(block.kept.to(before.device), before.shape[1])
        of_kept = fit_samples(now, before, prior, intercept, owners)
        maps.append(of_kept)
    weight = work.with_kept_outputs(name)
    return folded_weight(weight.double(), axis, kept, blocks, maps)


def _channels(meetings: Sequence[Meeting], block: Block, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept channels now, all channels as they were before the prune, and the samples that they are of."""
    kept_now = block.kept_positions_in(kept)
    width = block.positions.shape[1]
    now = []
    before = []
    owners = []
    earlier = 0
    for number, meeting in enumerate(meetings):
        whole = meeting.whole.x
        pruned = meeting.pruned.x
        numbers = whole.shape[1] + pruned.shape[1]
        places = places_in(whole, numbers, len(meetings), number)
        inputs = at_places(whole, places)
        before.append(block.rows(inputs))
        inputs = at_places(pruned, places)
        by_position = inputs[:, kept_now.T]
        now.append(by_position.flatten(0, 1))
        numbered = places.sample + earlier
        owners.append(numbered.repeat_interleave(width))
        earlier += len(whole)
    return torch.cat(now), torch.cat(before), torch.cat(owners)


def _product(layer: Linear, weight: Tensor, windows: Tensor) -> Tensor:
    """Return what a weight makes of windows, without a bias: (n, out_channels)."""
    matrix = as_matrix(weight, layer.groups, layer.transposed)
    by_group = windows.unflatten(2, (layer.groups, -1))
    groups_first = by_group.permute(2, 0, 1, 3)
    inputs = groups_first.flatten(2)
    product = torch.bmm(inputs, matrix.mT)  # (groups, n, out_channels of a group)
    return product.transpose(0, 1).flatten(1)


def _errors(work: Work, name: str, layer: Linear, samples: Samples, before: Tensor) -> LayerError:
    """Return the error with a weight from before, and with the one that the layer has now."""
    every = max(1, len(samples.outputs) // _TOLD)
    windows = samples.windows[::every]
    wanted = samples.outputs[::every].double()
    tiny = torch.finfo(torch.float64).tiny
    variance = wanted.var(0, correction=0).sum()
    shares = []
    for weight in (before, layer.weight):
        rest = wanted - _product(layer, weight, windows)
        if work.takes_up_means(name):
            rest = rest - rest.mean(0)
        error = rest.square().sum() / len(rest)
        share = error / variance.clamp_min(tiny)
        shares.append(float(share))
    return LayerError(before=shares[0], after=shares[1])
