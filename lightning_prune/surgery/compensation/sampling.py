"""Samples of what layers are given: some positions of each image, the same in every run."""

import torch
from torch import Tensor

__all__ = ["positions_of"]

_POSITIONS = 49  # of an image; neighbours tell little more
_FEW = 2**22  # numbers that are looked at in any case
_MOST = 2**26  # numbers that the samples of one layer may consist of


def positions_of(
    samples: int, positions: int, numbers: int, share: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which positions of which samples to look at, all if they are few: two of (n,) int64.

    Args:
        samples: Number of samples of a batch, such as images.
        positions: Number of positions of each.
        numbers: How many numbers there are at a position.
        share: Among how many batches the memory is shared.
        seed: What the choice is drawn with.
        device: Where to return them.
    """
    every = samples * positions
    few = _FEW // share // numbers
    most = _MOST // share // numbers
    most = min(most, max(few, samples * _POSITIONS))
    if every <= most:
        index = torch.arange(every)
        return (index // positions).to(device), (index % positions).to(device)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.arange(max(1, most)) % samples
    position = torch.randint(positions, sample.shape, generator=generator)
    return sample.to(device), position.to(device)
