"""What all data modules share: the validation split, the transforms of each part, the loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Transform = Callable[[Any], Tensor]


class LabelledImages(Protocol):
    """Images with labels, not yet transformed; the data sets of torchvision are of this kind."""

    @property
    def targets(self) -> Sequence[int] | Tensor:
        """Return the label of each image, (n,)."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return image and label."""


class TransformedImages(Dataset):
    """Some of the images of a data set, transformed.

    Training and validation images come from one data set but only the former are augmented, so that the transform
    belongs to the part and not to the data set.

    Args:
        images: The data set.
        indices: Which of its images, in this order.
        transform: What makes a tensor (c, h, w) of an image.

    Example:
        >>> from lightning_prune.datamodules.base import TransformedImages
        >>> part = TransformedImages([(1.0, 7), (2.0, 8), (3.0, 9)], [2, 0], lambda image: image * 10)
        >>> part[0], part[1], len(part)
        ((30.0, 9), (10.0, 7), 2)
    """

    def __init__(self, images: LabelledImages, indices: Sequence[int], transform: Transform) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images in this part."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image (c, h, w) and label."""
        image, label = self.images[self.indices[index]]
        return self.transform(image), int(label)


def stratified_split(labels: Sequence[int] | Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices at random into two parts, in the same proportion in every class.

    A class with at least two members is in both parts. The split depends on the arguments alone, not on the state of
    any global random generator, so that all processes of a training come to the same one.

    Args:
        labels: Class of each index, (n,).
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the split.

    Returns:
        The indices of the larger and those of the smaller part, both rising.

    Example:
        >>> from lightning_prune.datamodules.base import stratified_split
        >>> rest, part = stratified_split([0, 0, 0, 0, 1, 1, 1, 1], fraction=0.25, seed=0)
        >>> len(rest), len(part), sum(index < 4 for index in part)
        (6, 2, 1)
    """
    classes = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)
        chosen += members[order[:count]].tolist()
    rest = set(range(len(classes))) - set(chosen)
    return sorted(rest), sorted(chosen)


class ImageDataModule(L.LightningDataModule, ABC):
    """Load the images of one data set for training, validation and test.

    Validation images are taken from the training images; the test images serve the test alone. Everything that is
    random here depends on ``seed``: the split, and the order of the training images, which differs from epoch to epoch
    but is the same for epoch k whether or not the run was interrupted before. (Augmentation draws from the global
    generator of PyTorch: seed it with ``seed_everything``.)

    A subclass sets ``num_classes`` and ``input_shape`` and provides the images and their transforms.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images, 0 for loading in the training process.
        val_fraction: Share of the training images that is kept for validation, in (0, 1), of every class.
        seed: Seed of the split and of the order.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        See :class:`~lightning_prune.datamodules.DigitsDataModule`.
    """

    num_classes: int
    input_shape: tuple[int, int, int]

    def __init__(self, batch_size: int, num_workers: int, val_fraction: float, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is no batch: set it to 1 or more.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative: set it to 0 to load in the training process.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} is outside (0, 1): set it to 0.1 to keep a tenth.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.train_set: TransformedImages | None = None
        self.val_set: TransformedImages | None = None
        self.test_set: TransformedImages | None = None

    @abstractmethod
    def check_files(self) -> None:
        """Refuse data that is missing or incomplete, with a message that says what belongs where."""

    @abstractmethod
    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""

    @abstractmethod
    def transform(self, train: bool) -> Transform:
        """Return the transform of training images (with augmentation), or that of validation and test images."""

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
            images = self.load_images(train=False)
            self.test_set = TransformedImages(images, range(len(images)), self.transform(train=False))

    def _setup_training(self) -> None:
        train_images = self.load_images(train=True)
        val_images = self.load_validation_images()
        if val_images is None:
            val_images = train_images
            train_indices, val_indices = stratified_split(train_images.targets, self.val_fraction, self.seed)
            if not val_indices:
                raise ValueError("No class has two training images, so none can be kept for validation: add images.")
        else:
            train_indices, val_indices = list(range(len(train_images))), list(range(len(val_images)))
        self.train_set = TransformedImages(train_images, train_indices, self.transform(train=True))
        self.val_set = TransformedImages(val_images, val_indices, self.transform(train=False))

    def train_dataloader(self) -> DataLoader:
        """Return batches of training images (n, c, h, w) and labels (n,), in random order.

        In a loop of your own, call ``loader.sampler.set_epoch(epoch)`` before each epoch, as Lightning does; without it
        every epoch has the order of the first.
        """
        images = self._ready(self.train_set, "fit")
        # DistributedSampler also on one process: its order is a function of seed and epoch, whereas shuffle=True would
        # draw it from the global generator, whose state differs in a resumed run.
        sampler: DistributedSampler = DistributedSampler(
            images,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            shuffle=True,
            seed=self.seed,
        )
        return self._loader(images, sampler)

    def val_dataloader(self) -> DataLoader:
        """Return batches of validation images (n, c, h, w) and labels (n,), in fixed order."""
        return self._loader(self._ready(self.val_set, "validate"))

    def test_dataloader(self) -> DataLoader:
        """Return batches of test images (n, c, h, w) and labels (n,), in fixed order."""
        return self._loader(self._ready(self.test_set, "test"))

    def predict_dataloader(self) -> DataLoader:
        """Return the batches of :meth:`test_dataloader`."""
        return self._loader(self._ready(self.test_set, "predict"))

    def _ready(self, images: TransformedImages | None, stage: str) -> TransformedImages:
        if images is None:
            raise RuntimeError(f"The images are not loaded yet: call setup({stage!r}) before asking for batches.")
        return images

    def _loader(self, images: TransformedImages, sampler: DistributedSampler | None = None) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def require_files(folder: Path, names: Sequence[str], remedy: str) -> None:
    """Refuse a folder in which files are missing.

    Args:
        folder: The folder.
        names: Names of the files that must be in it.
        remedy: End of the message: what to do.

    Raises:
        FileNotFoundError: If the folder or a file is missing; names the missing files.

    Example:
        >>> from pathlib import Path
        >>> from lightning_prune.datamodules.base import require_files
        >>> require_files(Path("nowhere"), ["images"], "download them.")
        Traceback (most recent call last):
        FileNotFoundError: 'nowhere' does not exist: download them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} does not exist: {remedy}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(folder)!r} is incomplete, it lacks {', '.join(missing)}: {remedy}")


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Refuse a mean and standard deviation that cannot normalise images.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        channels: Number of channels.

    Raises:
        ValueError: If there is not one value per channel, or a standard deviation is not above 0.

    Example:
        >>> from lightning_prune.datamodules.base import check_normalisation
        >>> check_normalisation((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), channels=3)
    """
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} values: give {channels} of each, one per channel.")
    if min(std) <= 0:
        raise ValueError(f"std={tuple(std)} must be above 0 in every channel: give the deviation of pixels in [0, 1].")
