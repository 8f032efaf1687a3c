"""CIFAR-10, 32x32 pixels, from the files that torchvision uses."""

from __future__ import annotations

from pathlib import Path

from torchvision import datasets, transforms

from lightning_prune.datamodules.base import (
    ImageDataModule,
    LabelledImages,
    Transform,
    check_normalisation,
    require_files,
)

FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
FOLDER = "cifar-10-batches-py"


class CIFAR10DataModule(ImageDataModule):
    """Load CIFAR-10: 50,000 training and 10,000 test images, normalised, 3x32x32, ten classes.

    Args:
        root: Folder in which the unpacked Python version lies under ``cifar-10-batches-py``.
        download: Download the files into ``root`` if they are not there.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        augment: Crop training images at random after padding them by 4 pixels, and flip half of them.
        mean: Mean of each channel, of pixels in [0, 1]; the default is that of the training images. Published weights
            may need other values.
        std: Standard deviation of each channel.
        seed: Seed of the validation split and of the order.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_prune.datamodules import CIFAR10DataModule
        >>> data = CIFAR10DataModule(root="data", batch_size=256)
        >>> data.num_classes, data.input_shape
        (10, (3, 32, 32))
    """

    num_classes = 10
    input_shape = (3, 32, 32)

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        augment: bool = True,
        mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616),
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, seed)
        check_normalisation(mean, std, channels=3)
        self.root = Path(root)
        self.download = download
        self.augment = augment
        self.mean = mean
        self.std = std

    def prepare_data(self) -> None:
        """Download the files, if asked for, on one process."""
        if self.download:
            datasets.CIFAR10(self.root, download=True)

    def check_files(self) -> None:
        """Refuse a folder without the seven files."""
        require_files(
            self.root / FOLDER, FILES, "put the unpacked Python version of CIFAR-10 there, or set download=True."
        )

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        try:
            return datasets.CIFAR10(self.root, train=train)
        except RuntimeError as error:  # torchvision compares the checksums
            raise ValueError(
                f"A file in {str(self.root / FOLDER)!r} is damaged: delete the folder and set download=True."
            ) from error

    def transform(self, train: bool) -> Transform:
        """Return the normalisation, after crop and flip for training."""
        augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        return transforms.Compose(
            [
                *(augmentation if train and self.augment else []),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )
