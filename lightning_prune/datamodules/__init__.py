"""Data modules, one file per family of data sets."""

from lightning_prune.datamodules.base import ImageDataModule
from lightning_prune.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_prune.datamodules.digits import DigitsDataModule
from lightning_prune.datamodules.image_folder import ImageFolderDataModule
from lightning_prune.datamodules.imagenet import ImageNetDataModule
from lightning_prune.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "MNISTDataModule",
]
