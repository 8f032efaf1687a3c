"""Sampling: some positions of each image, the same in every run."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Places", "at_places", "places_in"]

_POSITIONS = 49  # of an image; neighbours tell little more
_FEW = 2**22  # numbers that are looked at in any case
_MOST = 2**24  # numbers that the samples of one layer may consist of


class Places(NamedTuple):
    """Positions of samples.

    Attributes:
        sample: (n,) int64.
        position: (n,) int64, counted through all spatial axes.
    """

    sample: Tensor
    position: Tensor


def places_in(x: Tensor, numbers: int, share: int, seed: int) -> Places:
    """Choose which positions of which samples to look at, all if they are few.

    Args:
        x: (samples, channels, *spatial).
        numbers: How many numbers there are to look at in each place.
        share: Among how many batches the memory is shared.
        seed: What the choice is drawn with.
    """
    samples = len(x)
    positions = x.shape[2:].numel()
    few = _FEW // share // numbers
    most = _MOST // share // numbers
    wanted = max(few, samples * _POSITIONS)
    count = max(1, min(most, wanted))
    every = samples * positions
    if every <= count:
        index = torch.arange(every, device=x.device)
        return Places(index // positions, index % positions)
    sample = torch.arange(count)
    sample = sample % samples
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(positions, (count,), generator=generator)
    return Places(sample.to(x.device), position.to(x.device))


def at_places(x: Tensor, places: Places) -> Tensor:
    """Return what there is in some places: (n, channels).

    Args:
        x: (samples, channels, *spatial).
        places: The places.
    """
    by_position = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    return by_position[places.sample, :, places.position]
