"""Loading of images, from memory or from files, as batches in an order that depends on seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_prune.datamodules.augmentation import NUMBERS

Pick = tuple[Tensor, Tensor]  # positions (n,) of the images of a training batch, and their random numbers (n, NUMBERS)


class LabelledImages(Protocol):
    """Images of one size with their labels, in memory or not."""

    @property
    def targets(self) -> Tensor:
        """Return the label of each image, (n,)."""

    def read(self, indices: Tensor, numbers: Tensor | None) -> Tensor:
        """Return bytes (k, c, h, w) of the images ``indices`` (k,); ``numbers`` (k, NUMBERS) only for training."""


@dataclass(frozen=True)
class PixelImages:
    """Images that are in memory.

    Args:
        pixels: (n, c, h, w), bytes.
        targets: Label of each image, (n,).
    """

    pixels: Tensor
    targets: Tensor

    def read(self, indices: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the images ``indices``."""
        return self.pixels.index_select(0, indices)


class ImageSubset(Dataset):
    """Some of the images of a data set, read a batch at a time.

    Args:
        images: The data set.
        indices: Which of its images, in this order.

    Example:
        >>> import torch
        >>> from lightning_prune.datamodules.loading import ImageSubset, PixelImages
        >>> images = PixelImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), targets=torch.tensor([7, 8, 9]))
        >>> pixels, labels = ImageSubset(images, [2, 0]).__getitems__([0, 1])
        >>> pixels.shape, labels
        (torch.Size([2, 1, 8, 8]), tensor([9, 7]))
    """

    def __init__(self, images: LabelledImages, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = torch.as_tensor(indices)

    def __len__(self) -> int:
        """Return the number of images in the subset."""
        return len(self.indices)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bytes (n, c, h, w), labels (n,) and random numbers (n, NUMBERS) of a training batch."""
        positions, numbers = pick
        indices = self.indices[positions]
        return self.images.read(indices, numbers), self.images.targets[indices], numbers

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Return the bytes (n, c, h, w) and labels (n,) of an evaluation batch."""
        indices = self.indices[positions]
        return self.images.read(indices, None), self.images.targets[indices]


class EpochSampler(DistributedSampler):
    """Deal the images of an epoch out to the processes, in batches and with the random numbers of each image.

    The order is that of ``DistributedSampler``, a function of seed and epoch; so are the random numbers of an image,
    whatever the batch and the process it falls to.

    Args:
        images: The images.
        batch_size: Images per batch, at least 1.
        seed: Seed of order and random numbers, at least 0.
        num_replicas: Number of processes.
        rank: Which of them this is.
    """

    first_batch = 0

    def __init__(self, images: Dataset, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(images, num_replicas, rank, shuffle=True, seed=seed)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Pick]:
        """Return the batches of the epoch, from ``first_batch`` on."""
        # Another stream than that of the order, which DistributedSampler draws from seed + epoch.
        seeds = numpy.random.SeedSequence((self.seed, self.epoch))
        mixed_seed = int(seeds.generate_state(1, numpy.uint64)[0])
        generator = torch.Generator().manual_seed(mixed_seed)
        numbers = torch.rand(len(self.dataset), NUMBERS, generator=generator)  # type: ignore[arg-type]
        order = torch.tensor(list(super().__iter__()))
        batches = order.split(self.batch_size)
        for positions in batches[self.first_batch :]:
            yield positions, numbers[positions]

    def __len__(self) -> int:
        """Return the number of batches of an epoch, whatever ``first_batch`` is."""
        return math.ceil(self.num_samples / self.batch_size)


class ResumableLoader(DataLoader):
    """A DataLoader over an ``EpochSampler`` that a checkpoint can bring back to the middle of an epoch.

    Lightning saves ``state_dict`` with the loops and loads it before it asks for the first batch.
    """

    sampler: EpochSampler
    used = 0  # batches of the epoch that have been given out
    interrupted = (-1, 0)  # the epoch that a checkpoint was written in, and how many batches of it were used

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return the batches of the epoch, the interrupted one from the batch where it was interrupted."""
        # Nothing here runs before the first batch is asked for: Lightning sets the epoch after it has called iter().
        epoch, used = self.interrupted
        self.used = used if epoch == self.sampler.epoch else 0
        self.sampler.first_batch = self.used
        for batch in super().__iter__():
            self.used += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches and how many of them were used."""
        return {"epoch": self.sampler.epoch, "batches": len(self), "used": self.used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the epoch of ``state`` at the batch it was interrupted at.

        Raises:
            ValueError: If the epoch was interrupted at a batch that has no counterpart now.
        """
        if state["batches"] != len(self) and 0 < state["used"] < state["batches"]:
            raise ValueError(
                f"The checkpoint was written after {state['used']} of {state['batches']} batches of an epoch, and now "
                f"it has {len(self)}: resume with the same data, batch_size and number of devices."
            )
        self.interrupted = (state["epoch"], state["used"])


def keep_batch(batch: Any) -> Any:
    """Return the batch, which ``ImageSubset`` has read at once."""
    return batch


def stratified_split(labels: Sequence[int] | Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices at random in two, in the same proportion in every class.

    A class with at least two members is on both sides. The split depends on the arguments alone, not on the state of
    any global random generator, so that all processes of a training come to the same one.

    Args:
        labels: Class of each index, (n,).
        fraction: Share of the second side, in (0, 1).
        seed: Seed of the split.

    Returns:
        The indices of the larger and those of the smaller side, both rising.

    Example:
        >>> from lightning_prune.datamodules.loading import stratified_split
        >>> larger, smaller = stratified_split([0, 0, 0, 0, 1, 1, 1, 1], fraction=0.25, seed=0)
        >>> len(larger), len(smaller), sum(index < 4 for index in smaller)
        (6, 2, 1)
    """
    classes = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        wanted = max(1, round(len(members) * fraction))
        count = min(wanted, len(members) - 1)
        order = torch.randperm(len(members), generator=generator)
        chosen += members[order[:count]].tolist()
    others = set(range(len(classes))) - set(chosen)
    return sorted(others), sorted(chosen)
