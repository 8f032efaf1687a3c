"""Augmentation of batches at once, on the device that trains, with other random numbers for every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# What the random numbers of an image are for. They come with the batch and are a function of seed, epoch and image
# alone: there is no random state that a resumed run, another number of processes or another device could change.
NUMBERS = 6
CROP = slice(0, 2)
FLIP = 2
CUTOUT = slice(3, 5)
BOX = 5


@dataclass(frozen=True)
class Augmentation:
    """Make network input of a batch of pixels: crop, flip, normalise, cut out.

    Evaluation batches come without random numbers and are only normalised.

    Args:
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, above 0.
        crop_padding: Pixels by which training images are padded with black before a random crop to their size; 0 for
            no crop.
        flip: Flip half of the training images from left to right.
        cutout: Side in pixels of the square that is set to the mean at a random place of each training image; 0 for
            none.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> from lightning_prune.datamodules.augmentation import NUMBERS, Augmentation
        >>> augmentation = Augmentation((0.5,), (0.5,), crop_padding=4, flip=True)
        >>> pixels = torch.full((8, 1, 28, 28), 255, dtype=torch.uint8)
        >>> augmentation(pixels).unique()
        tensor([1.])
        >>> augmentation(pixels, torch.rand(8, NUMBERS)).shape
        torch.Size([8, 1, 28, 28])

    Note:
        Cutout: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
        arXiv:1708.04552. The centre of the square is anywhere in the image, so that some of it may lie outside.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} values: give one of each per channel.")
        if min(self.std) <= 0:
            raise ValueError(
                f"std={tuple(self.std)} must be above 0 in every channel: give the deviation of pixels in [0, 1]."
            )
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding} is negative: set it to 0 for none.")
        if self.cutout < 0:
            raise ValueError(f"cutout={self.cutout} is negative: set it to 0 for none.")

    def __call__(self, pixels: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Return network input.

        Args:
            pixels: (n, c, h, w), bytes.
            numbers: (n, NUMBERS) random numbers in [0, 1) of training images; None for evaluation.

        Returns:
            (n, c, h, w), float32.
        """
        if numbers is None:
            return normalise(pixels, self.mean, self.std)
        if self.crop_padding:
            pixels = crop(pixels, self.crop_padding, numbers[:, CROP])
        if self.flip:
            pixels = flip(pixels, numbers[:, FLIP])
        images = normalise(pixels, self.mean, self.std)
        if self.cutout:
            images = cut_out(images, self.cutout, numbers[:, CUTOUT])
        return images


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels / 255 - mean) / std for bytes (n, c, h, w), in float32."""
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-middle / deviation for middle, deviation in zip(mean, std, strict=True)]
    scale_and_shift = torch.tensor([scale, shift], dtype=torch.float32, device=pixels.device)  # (2, c)
    scales, shifts = scale_and_shift.view(2, -1, 1, 1)
    return pixels.float().mul_(scales).add_(shifts)


def crop(pixels: Tensor, padding: int, numbers: Tensor) -> Tensor:
    """Pad images (n, c, h, w) with zeros and cut each to its size at a place of its own, by numbers (n, 2)."""
    height, width = pixels.shape[2:]
    # Integers 0 ... 2 * padding, all equally likely; a product of floats below 1 is below the integer too.
    places = (numbers * (2 * padding + 1)).long()
    top, left = places.unbind(1)
    padded = F.pad(pixels, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view, (n, c, y, x, h, w)
    images = torch.arange(len(pixels), device=pixels.device)
    return windows[images, :, top, left]


def flip(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Flip those images (n, c, h, w) from left to right whose number (n,) is below 0.5."""
    is_flipped = (numbers < 0.5).view(-1, 1, 1, 1)
    return torch.where(is_flipped, pixels.flip(3), pixels)


def cut_out(images: Tensor, size: int, numbers: Tensor) -> Tensor:
    """Set a square of each image (n, c, h, w) to 0, its centre by numbers (n, 2), what is outside cut off."""
    height, width = images.shape[2:]
    rows = _covered(height, size, numbers[:, 0])  # (n, h)
    columns = _covered(width, size, numbers[:, 1])  # (n, w)
    square = rows[:, None, :, None] & columns[:, None, None, :]  # (n, 1, h, w)
    return images.masked_fill_(square, 0.0)


def _covered(length: int, size: int, numbers: Tensor) -> Tensor:
    """Return (n, length): whether a position lies in the ``size`` ones around a centre, by numbers (n,)."""
    centre = (numbers * length).long()
    start = (centre - size // 2).unsqueeze(1)
    positions = torch.arange(length, device=centre.device)
    return (positions >= start) & (positions < start + size)
