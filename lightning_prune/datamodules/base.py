"""Data module that all others extend: the validation split, the loaders, augmentation on the device that trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.loading import (
    EpochSampler,
    ImageSubset,
    LabelledImages,
    ResumableLoader,
    keep_batch,
    stratified_split,
)


class ImageDataModule(L.LightningDataModule, ABC):
    """Load the images of one data set for training, validation and test.

    Validation images are taken from the training images; the test images serve the test alone. Everything that is
    random here is a function of ``seed``: the split, and for each epoch the order of the training images and what
    augmentation does to each. None of it depends on global generators, on the number of processes or workers, or on
    whether the run was interrupted before.

    Loaders return bytes; :meth:`on_after_batch_transfer`, which Lightning calls, makes network input of them on the
    device that trains. A loop of your own does it in two lines::

        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                images, labels = data.on_after_batch_transfer([tensor.to(device) for tensor in batch])

    A subclass sets ``num_classes`` and ``input_shape`` and provides the images.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images, 0 for loading in the training process.
        val_fraction: Share of the training images that is kept for validation, in (0, 1), of every class.
        seed: Seed of the split, the order and the augmentation, at least 0.
        augmentation: What makes network input of bytes.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        See :class:`~lightning_prune.datamodules.DigitsDataModule`.
    """

    num_classes: int
    input_shape: tuple[int, int, int]

    def __init__(
        self, batch_size: int, num_workers: int, val_fraction: float, seed: int, augmentation: Augmentation
    ) -> None:
        super().__init__()
        _check_settings(batch_size, num_workers, val_fraction, seed)
        channels = self.input_shape[0]
        if len(augmentation.mean) != channels:
            raise ValueError(f"mean and std have {len(augmentation.mean)} values: give {channels} of each.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.augmentation = augmentation
        self.train_set: ImageSubset | None = None
        self.val_set: ImageSubset | None = None
        self.test_set: ImageSubset | None = None

    @abstractmethod
    def check_files(self) -> None:
        """Refuse data that is missing or incomplete, with a message that says what belongs where."""

    @abstractmethod
    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""

    def load_validation_images(self) -> LabelledImages | None:
        """Return validation images that the data set itself names, or None where it names none."""
        return None

    def setup(self, stage: str) -> None:
        """Load what a stage needs, once.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If the data is missing or incomplete.
            ValueError: If the data cannot be used.
        """
        # All files are checked at every stage: a test set that lacks a file should stop the training before, not after.
        self.check_files()
        if stage in ("fit", "validate") and self.train_set is None:
            self._setup_training()
        if stage in ("test", "predict") and self.test_set is None:
            images = self._checked("test", self.load_images(train=False))
            self.test_set = _all_of(images)

    def _setup_training(self) -> None:
        train_images = self._checked("training", self.load_images(train=True))
        val_images = self.load_validation_images()
        if val_images is not None:
            self.train_set = _all_of(train_images)
            self.val_set = _all_of(self._checked("validation", val_images))
            return
        train_indices, val_indices = stratified_split(train_images.targets, self.val_fraction, self.seed)
        if not val_indices:
            raise ValueError("No class has two training images, so none can be kept for validation: add images.")
        self.train_set = ImageSubset(train_images, train_indices)
        self.val_set = ImageSubset(train_images, val_indices)

    def _checked(self, split: str, images: LabelledImages) -> LabelledImages:
        labels = images.targets
        is_wrong = (labels < 0) | (labels >= self.num_classes)
        wrong = is_wrong.nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            raise ValueError(
                f"Label {int(labels[first])} of {split} image {first} is outside 0 ... "
                f"{self.num_classes - 1}: the labels that {type(self).__name__} found are damaged, replace the files."
            )
        return images

    def train_dataloader(self) -> DataLoader:
        """Return batches of training images, in random order: bytes (n, c, h, w), labels (n,), random numbers.

        With ``overfit_batches`` they come in fixed order and without the numbers, so that each epoch sees the same.
        """
        if self.trainer and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            # Lightning would put a sampler of its own in the place of one that shuffles.
            return self._evaluation_loader(self.train_set, "fit")
        images = self._ready(self.train_set, "fit")
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(images, self.batch_size, self.seed, world_size, rank)
        return ResumableLoader(images, batch_size=None, sampler=sampler, collate_fn=keep_batch, **self._workers)

    def val_dataloader(self) -> DataLoader:
        """Return batches of validation images, in fixed order: bytes (n, c, h, w) and labels (n,)."""
        return self._evaluation_loader(self.val_set, "validate")

    def test_dataloader(self) -> DataLoader:
        """Return batches of test images, in fixed order: bytes (n, c, h, w) and labels (n,)."""
        return self._evaluation_loader(self.test_set, "test")

    def predict_dataloader(self) -> DataLoader:
        """Return the batches of :meth:`test_dataloader`."""
        return self._evaluation_loader(self.test_set, "predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """Make network input of a batch, on the device that it is on.

        Args:
            batch: Bytes (n, c, h, w), labels (n,) and, for training, random numbers of each image.
            dataloader_idx: Unused; Lightning passes it.

        Returns:
            Images (n, c, h, w), augmented if there are random numbers, normalised, in the float type that the Trainer's
            precision asks for; and the labels.
        """
        if isinstance(batch, Tensor):  # the example input that Lightning summarises or exports the network with
            return batch
        pixels, labels, *numbers = batch
        images = self.augmentation(pixels, *numbers)
        if self.trainer:
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    @property
    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            # Page-locked memory is what a GPU copies from while it computes; elsewhere it is one more copy.
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def _evaluation_loader(self, subset: ImageSubset | None, stage: str) -> DataLoader:
        images = self._ready(subset, stage)
        return DataLoader(images, batch_size=self.batch_size, collate_fn=keep_batch, **self._workers)

    def _ready(self, subset: ImageSubset | None, stage: str) -> ImageSubset:
        if subset is None:
            raise RuntimeError(f"The images are not loaded yet: call setup({stage!r}) before asking for batches.")
        return subset


def _all_of(images: LabelledImages) -> ImageSubset:
    return ImageSubset(images, range(len(images.targets)))


def _check_settings(batch_size: int, num_workers: int, val_fraction: float, seed: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no batch: set it to 1 or more.")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} is negative: set it to 0 to load in the training process.")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} is outside (0, 1): set it to 0.1 to keep a tenth.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: set it to 0 or above.")
