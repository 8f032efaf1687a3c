"""Data modules, one file per family of data sets."""

from lightning_prune.datamodules.base import ImageDataModule
from lightning_prune.datamodules.cifar10 import CIFAR10DataModule
from lightning_prune.datamodules.digits import DigitsDataModule
from lightning_prune.datamodules.image_folder import ImageFolderDataModule
from lightning_prune.datamodules.mnist import MNISTDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
]
