"""MNIST, 28x28 pixels, from the files that torchvision uses."""

from __future__ import annotations

from pathlib import Path

from torchvision import datasets, transforms

from lightning_prune.datamodules.base import ImageDataModule, LabelledImages, Transform, require_files

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MEAN, STD = (0.1307,), (0.3081,)  # of the pixels of the training images


class MNISTDataModule(ImageDataModule):
    """Load MNIST: 60,000 training and 10,000 test images, normalised, 1x28x28, ten classes.

    Args:
        root: Folder in which the four unpacked files lie under ``MNIST/raw``.
        download: Download the files into ``root`` if they are not there.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        seed: Seed of the validation split and of the order.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_prune.datamodules import MNISTDataModule
        >>> data = MNISTDataModule(root="data", batch_size=64)
        >>> data.num_classes, data.input_shape
        (10, (1, 28, 28))
    """

    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, seed)
        self.root = Path(root)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files, if asked for, on one process."""
        if self.download:
            datasets.MNIST(self.root, download=True)

    def check_files(self) -> None:
        """Refuse a folder without the four files."""
        require_files(
            self.root / "MNIST" / "raw", FILES, "put the unpacked files of MNIST there, or set download=True."
        )

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        return datasets.MNIST(self.root, train=train)

    def transform(self, train: bool) -> Transform:
        """Return the normalisation; there is no augmentation."""
        return transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
