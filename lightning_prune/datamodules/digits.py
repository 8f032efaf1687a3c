"""UCI handwritten digits, 8x8 pixels, as bundled with scikit-learn: nothing to download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms

from lightning_prune.datamodules.base import ImageDataModule, LabelledImages, Transform, stratified_split

# The bundled file does not say which images are for the test, so this package fixes a fifth of them, once and for all:
# `seed` moves the validation split only, and accuracies stay comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0


class _Digits:
    """Images (n, 1, 8, 8) with pixels in [0, 1], and their labels (n,)."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


class DigitsDataModule(ImageDataModule):
    """Load the 1,797 handwritten digits of UCI: 1x8x8 pixels in [0, 1], ten classes, 359 of them for the test.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images; 0 is fastest here.
        val_fraction: Share of the other 1,438 images that is kept for validation, in (0, 1).
        augment: Move training images by up to one pixel.
        seed: Seed of the validation split and of the order.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_prune.datamodules import DigitsDataModule
        >>> data = DigitsDataModule(batch_size=64)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, len(data.train_set), len(data.val_set)
        (torch.Size([64, 1, 8, 8]), 1295, 143)
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, seed)
        self.augment = augment

    def check_files(self) -> None:
        """Refuse an environment without scikit-learn, which bundles the images."""
        _bundled_digits()

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        digits = _bundled_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels are 0 ... 16
        targets = torch.as_tensor(digits.target)
        train_indices, test_indices = stratified_split(targets, TEST_FRACTION, TEST_SEED)
        indices = train_indices if train else test_indices
        return _Digits(images[indices], targets[indices])

    def transform(self, train: bool) -> Transform:
        """Return a random crop for training if asked for, otherwise what leaves the images as they are."""
        return transforms.RandomCrop(8, padding=1) if train and self.augment else nn.Identity()


def _bundled_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            'The digits are bundled with scikit-learn: install it with pip install "lightning-prune[quickstart]".'
        ) from error
    return load_digits()
