"""ImageNet, in the folders that torchvision expects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from torch import Tensor

from lightning_prune.datamodules.image_files import ImageFiles
from lightning_prune.datamodules.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolderDataModule


class ImageNetDataModule(ImageFolderDataModule):
    """Load ImageNet in torchvision's layout, ``root/train/<wnid>/`` and ``root/val/<wnid>/``, normalised.

    Accuracies on ImageNet are published for its folder ``val``: here it serves the test alone, and the validation
    images are training images that are kept back. Training images are random boxes of 8 % to 100 % of the area, half of
    them flipped; the others are the central square with 7/8 of the shorter side (224 of 256 pixels). Images are decoded
    in the workers, at a reduced size where that has enough pixels.

    Args:
        root: Folder of ``train`` and ``val``.
        image_size: Height and width in pixels that images get.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images, for each process that trains.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        cutout: Side in pixels of the square that is cut out of each training image, 0 for none.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        seed: Seed of the validation split, the order and the augmentation, at least 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_prune.datamodules import ImageNetDataModule
        >>> ImageNetDataModule(root="imagenet", image_size=160).input_shape
        (3, 160, 160)
    """

    test_split = "val"

    def __init__(
        self,
        root: str = "data/imagenet",
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 8,
        val_fraction: float = 0.02,
        cutout: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root, image_size, batch_size, num_workers, val_fraction, in_memory=False,
            crop_padding=0, flip=True, cutout=cutout, mean=mean, std=std, seed=seed,
        )  # fmt: skip

    def files(self, paths: numpy.ndarray, targets: Tensor) -> ImageFiles:
        """Return images that are decoded when they are asked for, the training images in random boxes."""
        return ImageFiles(paths, targets, self.image_size, margin=0.875, area=(0.08, 1.0))
