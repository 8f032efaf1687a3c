"""Running statistics of batch normalisation, as they follow what is normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Normalisation
from lightning_prune.surgery.compensation.work import Work

__all__ = ["adapt_statistics"]


def adapt_statistics(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Change running statistics by as much as what is normalised has changed.

    Args:
        work: What the compensation works with.
        name: Name of the running mean.
        meetings: The calls of the layer.
    """
    before = _Statistics()
    after = _Statistics()
    for meeting in meetings:
        before.add(work.kept_inputs(name, meeting.whole.x))
        after.add(meeting.pruned.x)
    norm = meetings[0].pruned
    assert isinstance(norm, Normalisation)
    # As differences, so that what has not changed keeps statistics that have come from all of the training data.
    changed = after.mean - before.mean
    mean = norm.mean.double() + changed
    drift = work.drifts.get(name)
    if drift is not None:  # the layer before was fitted to the scale that there was, and to more than it returned
        work.write(norm.mean, mean - drift)
        return
    work.write(norm.mean, mean)
    regular_before = before.variance + norm.eps
    regular_after = after.variance + norm.eps
    regular = norm.variance.double() + norm.eps
    regular = regular * regular_after / regular_before
    variance = regular - norm.eps
    work.write(norm.variance, variance.clamp_min(0))


class _Statistics:
    """Mean and variance of channels over several batches.

    Attributes:
        count: Over how many numbers.
        mean: (channels,) float64.
        variance: (channels,) float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.variance = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add (samples, channels, *spatial)."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, axes, correction=0)
        count = x.numel() // x.shape[1]
        share = count / (self.count + count)
        other = 1 - share
        apart = mean.double() - self.mean
        self.mean = self.mean + share * apart
        within = other * self.variance + share * variance.double()
        between = share * other * apart.square()
        self.variance = within + between
        self.count += count
