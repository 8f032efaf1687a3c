"""MNIST and Fashion-MNIST, 28x28 pixels, from the files that torchvision uses."""

from __future__ import annotations

import math
import struct

import numpy
import torch
from torch import Tensor
from torchvision import datasets

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.downloaded import DownloadedDataModule
from lightning_prune.datamodules.loading import LabelledImages, PixelImages

UNSIGNED_BYTES = 8  # the element type in the header of an IDX file


class MNISTDataModule(DownloadedDataModule):
    """Load MNIST: 60,000 training and 10,000 test images, normalised, 1x28x28, ten classes.

    The four unpacked files lie under ``MNIST/raw`` in ``root``. There is no augmentation unless it is asked for.
    Arguments are those of :class:`~lightning_prune.datamodules.downloaded.DownloadedDataModule`.

    Example:
        >>> from lightning_prune.datamodules import MNISTDataModule
        >>> data = MNISTDataModule(root="data", batch_size=64)
        >>> data.num_classes, data.input_shape
        (10, (1, 28, 28))
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    source = datasets.MNIST
    folder = "MNIST/raw"
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    usual = Augmentation(mean=(0.1307,), std=(0.3081,))  # of the pixels of the training images

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        images, labels = self.files[:2] if train else self.files[2:]
        pixels = self._read_idx(images, axes=3)  # (n, h, w)
        targets = self._read_idx(labels, axes=1)  # (n,)
        if len(pixels) != len(targets):
            raise self.damaged(labels, f"{len(targets)} labels for {len(pixels)} images")
        size = pixels.shape[1:]
        if size != self.input_shape[1:]:
            raise self.damaged(images, f"images of {' x '.join(map(str, size))} pixels")
        return PixelImages(pixels.unsqueeze(1), targets.long())

    def _read_idx(self, name: str, axes: int) -> Tensor:
        """Return the bytes of an IDX file: a header of type, axes and sizes, then the values."""
        path = self.path / name
        start = 4 + 4 * axes
        with path.open("rb") as file:
            header = file.read(start)
        magic = bytes([0, 0, UNSIGNED_BYTES, axes])
        if len(header) < start or not header.startswith(magic):
            raise self.damaged(name, "it does not begin as an IDX file of bytes does")
        sizes = struct.unpack(f">{axes}I", header[4:])
        expected = start + math.prod(sizes)
        found = path.stat().st_size
        if found != expected:
            raise self.damaged(name, f"{found} bytes instead of {expected}")
        values = numpy.fromfile(path, numpy.uint8, offset=start)
        return torch.from_numpy(values).view(sizes)


class FashionMNISTDataModule(MNISTDataModule):
    """Load Fashion-MNIST: 60,000 training and 10,000 test images of clothes, normalised, 1x28x28, ten classes.

    The four unpacked files lie under ``FashionMNIST/raw`` in ``root``. There is no augmentation unless it is asked for.
    Arguments are those of :class:`~lightning_prune.datamodules.downloaded.DownloadedDataModule`.

    Example:
        >>> from lightning_prune.datamodules import FashionMNISTDataModule
        >>> FashionMNISTDataModule(crop_padding=2, flip=True).augmentation
        Augmentation(mean=(0.286,), std=(0.353,), crop_padding=2, flip=True, cutout=0)
    """

    source = datasets.FashionMNIST
    folder = "FashionMNIST/raw"
    usual = Augmentation(mean=(0.2860,), std=(0.3530,))
