"""Running statistics of batch normalisation, as they follow what is normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Normalisation
from lightning_prune.surgery.compensation.work import Work

__all__ = ["Statistics", "adapt_statistics", "follow"]

_BLOCK = 2**20  # numbers at a time, which a cache holds
_ENOUGH = 2**15  # numbers of each channel in a batch: from there on, some positions are left out


def adapt_statistics(work: Work, name: str, meetings: Sequence[Meeting]) -> None:
    """Change running statistics by as much as what is normalised has changed.

    Args:
        work: What the compensation works with.
        name: Name of the running mean.
        meetings: The calls of the layer.
    """
    before = Statistics()
    after = Statistics()
    for meeting in meetings:
        before.add(work.kept_inputs(name, meeting.whole.x))
        after.add(meeting.pruned.x)
    norm = meetings[0].pruned
    assert isinstance(norm, Normalisation)
    follow(work, name, norm, before, after)


def follow(work: Work, name: str, norm: Normalisation, before: "Statistics", after: "Statistics") -> None:
    """Change running statistics by as much as others have changed.

    Args:
        work: What the compensation works with.
        name: Name of the running mean.
        norm: A call of the layer in the pruned network.
        before: Statistics of what is normalised before the prune, of the kept channels.
        after: Those in the pruned network.
    """
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


class Statistics:
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

    def of_some(self, kept: Tensor) -> "Statistics":
        """Return the statistics of some channels.

        Args:
            kept: (n,) int64 channels.
        """
        some = Statistics()
        some.count = self.count
        some.mean = self.mean[kept]
        some.variance = self.variance[kept]
        return some

    def add(self, x: Tensor) -> None:
        """Add (samples, channels, *spatial)."""
        x = _thinned(x)
        per_sample = x[0].numel()
        samples = max(1, _BLOCK // per_sample)
        for some in x.split(samples):
            self._add_block(some)

    def _add_block(self, x: Tensor) -> None:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        # Two passes: `torch.var_mean` takes many times as long over such axes.
        mean = x.mean(axes, keepdim=True)
        apart = x - mean
        variance = apart.square_().mean(axes)
        mean = mean.flatten()
        count = x.numel() // x.shape[1]
        share = count / (self.count + count)
        other = 1 - share
        moved = mean.double() - self.mean
        self.mean = self.mean + share * moved
        within = other * self.variance + share * variance.double()
        between = share * other * moved.square()
        self.variance = within + between
        self.count += count


def _thinned(x: Tensor) -> Tensor:
    """Leave out positions, the same for any number of channels, if each channel has more numbers than are needed."""
    axes = x.dim() - 2
    numbers = x.numel() // x.shape[1]  # of each channel
    shortest = min(x.shape[2:], default=1)
    step = 1
    while step < shortest and numbers > _ENOUGH * step**axes:
        step += 1
    every = [slice(None, None, step)] * axes
    places = (slice(None), slice(None), *every)
    return x[places]
