"""UCI handwritten digits, 8x8 pixels, as bundled with scikit-learn: nothing to download."""

from __future__ import annotations

from typing import Any

import torch

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.base import ImageDataModule
from lightning_prune.datamodules.loading import LabelledImages, PixelImages, stratified_split

# The bundled file does not say which images are for the test, so this package fixes a fifth of them, once and for all:
# `seed` moves the validation split only, and accuracies stay comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0
BRIGHTEST = 16  # of the pixels as they are bundled


class DigitsDataModule(ImageDataModule):
    """Load the 1,797 handwritten digits of UCI: 1x8x8 pixels in [0, 1], ten classes, 359 of them for the test.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images; 0 is fastest here.
        val_fraction: Share of the other 1,438 images that is kept for validation, in (0, 1).
        augment: Move training images by up to one pixel.
        seed: Seed of the validation split, the order and the augmentation, at least 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> from lightning_prune.datamodules import DigitsDataModule
        >>> data = DigitsDataModule(batch_size=64)
        >>> data.setup("fit")
        >>> images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
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
        scaling = Augmentation(mean=(0.0,), std=(BRIGHTEST / 255,), crop_padding=1 if augment else 0)
        super().__init__(batch_size, num_workers, val_fraction, seed, scaling)

    def check_files(self) -> None:
        """Refuse an environment without scikit-learn, which bundles the images."""
        _bundled_digits()

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        digits = _bundled_digits()
        pixels = torch.as_tensor(digits.images, dtype=torch.uint8).unsqueeze(1)
        targets = torch.as_tensor(digits.target)
        train_indices, test_indices = stratified_split(targets, TEST_FRACTION, TEST_SEED)
        indices = train_indices if train else test_indices
        return PixelImages(pixels[indices], targets[indices])


def _bundled_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            'The digits are bundled with scikit-learn: install it with pip install "lightning-prune[quickstart]".'
        ) from error
    return load_digits()
