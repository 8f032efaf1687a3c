"""What compensation does to one layer, once both networks have come to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.folding import (
    channel_map,
    folded_weight,
    inputs_of,
    rows_of,
    weight_with_kept_outputs,
)
from lightning_prune.surgery.compensation.inputs import Block, blocks_of, kept_outputs
from lightning_prune.surgery.compensation.least_squares import Moments, fit_samples
from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Linear, Normalisation, as_matrix, from_matrix
from lightning_prune.surgery.compensation.sampling import positions_of
from lightning_prune.surgery.compensation.work import Work
from lightning_prune.surgery.compensation_report import LayerError

__all__ = ["adapt_statistics", "measure", "refit"]

_TOLD = 2048  # windows that the error of a layer is measured on


# -- normalisation -----------------------------------------------------------------------------------------------------


def adapt_statistics(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Change running statistics by as much as what is normalised has changed.

    Args:
        work: What the compensation works with.
        name: Name of the running mean.
        meetings: The calls of the layer.
    """
    before = _Statistics()
    after = _Statistics()
    kept = work.kept.get(name, {}).get(0)
    for meeting in meetings:
        x = meeting.whole.x
        before.add(x if kept is None else x.index_select(1, kept.to(x.device)))
        after.add(meeting.pruned.x)
    step = meetings[0].pruned
    assert isinstance(step, Normalisation)
    # As differences, so that what was not changed keeps statistics that have come from all of the training data.
    mean = step.mean.double() + after.mean - before.mean
    ratio = (after.variance + step.eps) / (before.variance + step.eps)
    variance = (step.variance.double() + step.eps) * ratio - step.eps
    work.write(step.mean, mean)
    work.write(step.variance, variance.clamp_min(0))


class _Statistics:
    """Mean and variance of channels over several batches."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.variance: Tensor = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Add (samples, channels, *spatial)."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, axes, correction=0)
        mean, variance = mean.double(), variance.double()
        if self.count == 0:
            self.count, self.mean, self.variance = count, mean, variance
            return
        share = count / (self.count + count)
        apart = mean - self.mean
        self.mean = self.mean + share * apart
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * apart.square()
        self.count += count


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    """What a layer is given in the pruned network, and what it returned before the prune.

    Attributes:
        windows: (n, taps, in_channels).
        outputs: (n, out_channels) of the channels that are kept.
    """

    windows: Tensor
    outputs: Tensor


def refit(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Give a weight the values with which it comes nearest to what it computed before the prune.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
    """
    step = meetings[0].pruned
    if not isinstance(step, Linear) or step.depthwise:
        return
    samples = _samples(work, name, meetings)
    before = work.tensors[name].detach().clone()
    intercept = work.takes_up_means(name, step)
    weight = before.double()
    wide = False
    axis = work.survey.in_axis[name]
    if axis is not None:
        blocks = blocks_of(work.model, work.plan, name, axis, work.kept.get(name, {}))
        weight = _refit_channels(work, name, meetings, blocks, intercept)
        wide = blocks[0].positions.shape[1] > 1
    if not wide:
        prior = as_matrix(weight, step.groups, step.transposed)
        fitted = _fit_by_group(samples, prior, intercept)
        weight = from_matrix(fitted, before, step.groups, step.transposed)
    _put(work, name, step, samples, weight)
    work.report.errors[name] = _errors(work, name, step, samples, before)


def measure(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Note how far a layer is from what it computed before the prune, with a weight that was folded before.

    Args:
        work: What the compensation works with.
        name: Name of the weight.
        meetings: The calls of the layer.
    """
    step = meetings[0].pruned
    if isinstance(step, Linear):
        samples = _samples(work, name, meetings)
        work.report.errors[name] = _errors(work, name, step, samples, work.uncompensated[name])


def _put(work: Work, name: str, step: Linear, samples: _Samples, weight: Tensor) -> None:
    """Write a weight, and the bias that goes with it."""
    work.write(step.weight, weight)
    if name in work.survey.normalised or not work.has(step.bias) or step.bias is None:
        return
    mean = samples.windows.double().mean(0, keepdim=True)
    constant = samples.outputs.double().mean(0) - _outputs(step, step.weight.double(), mean)[0]
    work.write(step.bias, constant)


def _outputs(step: Linear, weight: Tensor, windows: Tensor) -> Tensor:
    """Return what a weight makes of windows, without a bias: (n, out_channels)."""
    matrix = as_matrix(weight, step.groups, step.transposed)
    by_group = windows.unflatten(2, (step.groups, -1)).permute(2, 0, 1, 3).flatten(2)  # (groups, n, inputs)
    return torch.bmm(by_group, matrix.mT).transpose(0, 1).flatten(1)


def _fit_by_group(samples: _Samples, prior: Tensor, intercept: bool) -> Tensor:
    """Fit each convolution group on its own: (groups, out_channels of a group, inputs of a group)."""
    groups = len(prior)
    windows = samples.windows.unflatten(2, (groups, -1))
    outputs = samples.outputs.unflatten(1, (groups, -1))
    fitted = []
    for group in range(groups):
        inputs = windows[:, :, group].flatten(1)
        fitted.append(fit_samples(inputs, outputs[:, group], prior[group], intercept))
    return torch.stack(fitted)


def _refit_channels(
    work: Work, name: str, meetings: Sequence[Meeting], blocks: Sequence[Block], intercept: bool
) -> Tensor:
    """Fold a layer: by a map from the kept channels as they are now to all channels as they were, for all positions."""
    axis = work.survey.in_axis[name]
    kept = work.kept.get(name, {}).get(axis)
    maps = []
    for block in blocks:
        moments = _moments_of_channels(meetings, block, kept)
        maps.append(channel_map(moments, block.kept, intercept))
    weight = weight_with_kept_outputs(work, name, axis)
    return folded_weight(weight.double(), axis, kept, blocks, maps)


def _moments_of_channels(meetings: Sequence[Meeting], block: Block, kept: Tensor | None) -> Moments:
    """Return moments of the kept channels now, and with these of all channels as they were before the prune."""
    positions_of_kept = block.positions[block.kept]
    if kept is not None:
        positions_of_kept = torch.searchsorted(kept, positions_of_kept)
    moments = None
    for number, meeting in enumerate(meetings):
        whole, pruned = inputs_of((meeting.whole.x, meeting.pruned.x), len(meetings), number)
        now = rows_of(pruned, positions_of_kept)
        before = rows_of(whole, block.positions)
        moments = moments or Moments.like(now, before)
        moments.add(now, before)
    assert moments is not None
    return moments


def _samples(work: Work, name: str, meetings: Sequence[Meeting]) -> _Samples:
    """Return windows and outputs of all batches."""
    windows = []
    outputs = []
    for number, meeting in enumerate(meetings):
        shaped = meeting.pruned.shaped(meeting.output)
        inputs = meeting.pruned.x.shape[1] * meeting.pruned.weight.shape[2:].numel()
        positions = shaped.shape[2:].numel()
        numbers = inputs + shaped.shape[1]
        sample, position = positions_of(len(shaped), positions, numbers, len(meetings), number, shaped.device)
        windows.append(meeting.pruned.windows(sample, position, shaped.shape[2:]))
        by_position = shaped.flatten(2) if shaped.dim() > 2 else shaped[:, :, None]
        output = by_position[sample, :, position]
        kept = kept_outputs(meeting.whole, meeting.whole.weight, work.kept.get(name, {}))
        outputs.append(output if kept is None else output[:, kept.to(output.device)])
    return _Samples(torch.cat(windows), torch.cat(outputs))


def _errors(work: Work, name: str, step: Linear, samples: _Samples, before: Tensor) -> LayerError:
    """Return the error with a weight from before, and with the one that the layer has now."""
    every = max(1, len(samples.outputs) // _TOLD)
    windows = samples.windows[::every]
    wanted = samples.outputs[::every].double()
    variance = wanted.var(0, correction=0).sum().clamp_min(torch.finfo(torch.float64).tiny)
    errors = []
    for weight in (before, step.weight):
        rest = wanted - _outputs(step, weight, windows)
        if work.takes_up_means(name, step):
            rest = rest - rest.mean(0)
        errors.append(float(rest.square().mean(0).sum() / variance))
    return LayerError(*errors)
