"""CIFAR-10 and CIFAR-100, 32x32 pixels, from the files that torchvision uses."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.downloaded import DownloadedDataModule
from lightning_prune.datamodules.loading import LabelledImages, PixelImages


class CIFAR10DataModule(DownloadedDataModule):
    """Load CIFAR-10: 50,000 training and 10,000 test images, normalised, 3x32x32, ten classes.

    The unpacked Python version lies under ``cifar-10-batches-py`` in ``root``. Training images are cropped at random
    after padding them by 4 pixels, and half of them are flipped, unless told otherwise. Arguments are those of
    :class:`~lightning_prune.datamodules.downloaded.DownloadedDataModule`.

    Example:
        >>> from lightning_prune.datamodules import CIFAR10DataModule
        >>> data = CIFAR10DataModule(root="data", batch_size=256, cutout=16)
        >>> data.num_classes, data.input_shape
        (10, (3, 32, 32))
    """

    num_classes = 10
    input_shape = (3, 32, 32)
    source = datasets.CIFAR10
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    usual = Augmentation(  # mean and deviation of the pixels of the training images
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_padding=4, flip=True
    )
    labels_key = b"labels"

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        checksums = dict(self.source.train_list if train else self.source.test_list)
        pixels_of_files, targets = [], []
        for name, checksum in checksums.items():
            entry = self._read_pickle(name, checksum)
            pixels = torch.from_numpy(entry[b"data"])
            pixels_of_files.append(pixels.view(-1, *self.input_shape))
            targets += entry[self.labels_key]
        return PixelImages(_join(pixels_of_files), torch.tensor(targets))

    def _read_pickle(self, name: str, checksum: str) -> dict[bytes, Any]:
        path = self.path / name
        # Checked before it is read: a pickle may run anything. torchvision downloads what has these checksums.
        if not check_integrity(path, checksum):
            raise self.damaged(name, "its MD5 sum is not the published one")
        with path.open("rb") as file:
            # The one in Python: that in C has the pixels in memory twice while it reads them.
            return pickle._Unpickler(file, encoding="bytes").load()


def _join(pixels_of_files: list[Tensor]) -> Tensor:
    """Return the images of all files, and free the memory of each file as soon as it is copied."""
    if len(pixels_of_files) == 1:
        return pixels_of_files[0]
    images = sum(map(len, pixels_of_files))
    image_shape = pixels_of_files[0].shape[1:]
    joined = pixels_of_files[0].new_empty(images, *image_shape)
    start = 0
    while pixels_of_files:
        pixels = pixels_of_files.pop(0)
        stop = start + len(pixels)
        joined[start:stop] = pixels
        start = stop
    return joined


class CIFAR100DataModule(CIFAR10DataModule):
    """Load CIFAR-100: 50,000 training and 10,000 test images, normalised, 3x32x32, the hundred fine classes.

    The unpacked Python version lies under ``cifar-100-python`` in ``root``. Training images are cropped at random after
    padding them by 4 pixels, and half of them are flipped, unless told otherwise. Arguments are those of
    :class:`~lightning_prune.datamodules.downloaded.DownloadedDataModule`.

    Example:
        >>> from lightning_prune.datamodules import CIFAR100DataModule
        >>> CIFAR100DataModule(root="data").num_classes
        100
    """

    num_classes = 100
    source = datasets.CIFAR100
    folder = "cifar-100-python"
    files = ("train", "test")
    usual = Augmentation(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_padding=4, flip=True)
    labels_key = b"fine_labels"
