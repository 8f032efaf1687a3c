"""Data module of the small data sets that torchvision downloads: they lie in one folder and fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.base import ImageDataModule


class DownloadedDataModule(ImageDataModule):
    """Load one of torchvision's small data sets.

    A subclass sets the class attributes and reads the files.

    Args:
        root: Folder in which the files lie, in torchvision's layout.
        download: Download the files into ``root`` if they are not there.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images; 0 is fastest, as all images are in memory.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        crop_padding: Pixels by which training images are padded before a random crop, 0 for none.
        flip: Flip half of the training images from left to right.
        cutout: Side in pixels of the square that is cut out of each training image, 0 for none.
        mean: Mean of each channel, of pixels in [0, 1]. Published weights may need other values than the data set's.
        std: Standard deviation of each channel.
        seed: Seed of the validation split, the order and the augmentation, at least 0.

    Where crop_padding, flip, mean or std is None, the data set's usual one is taken.

    Raises:
        ValueError: If an argument is outside its range.
    """

    source: Any  # the data set's class in torchvision, which knows the address and downloads
    folder: str  # of the files, below the root
    files: tuple[str, ...]
    usual: Augmentation

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        crop_padding: int | None = None,
        flip: bool | None = None,
        cutout: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        settings = {"crop_padding": crop_padding, "flip": flip, "cutout": cutout, "mean": mean, "std": std}
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        augmentation = replace(self.usual, **given)
        super().__init__(batch_size, num_workers, val_fraction, seed, augmentation)
        self.root = Path(root)
        self.download = download

    @property
    def path(self) -> Path:
        """Folder of the files."""
        return self.root / self.folder

    def prepare_data(self) -> None:
        """Download the files, if asked for and not there, on one process.

        Raises:
            ConnectionError: If they cannot be had; says which file goes where.
        """
        if not self.download or not self._missing():
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # A second run that starts now waits for the first, and finds the files.
            with FileLock(self.root / f"{self.source.__name__}.lock"):
                self.source(self.root, download=True)
        except (OSError, RuntimeError) as error:  # no network, a full disk, a broken transfer
            raise ConnectionError(
                f"{self.source.__name__} could not be downloaded ({' '.join(str(error).split())}): try again, or put "
                f"{', '.join(self.files)} into {str(self.path)!r}."
            ) from error

    def check_files(self) -> None:
        """Refuse a folder in which files are missing."""
        remedy = f"put the unpacked files of {self.source.__name__} there, or set download=True."
        if not self.path.is_dir():
            raise FileNotFoundError(f"{str(self.path)!r} does not exist: {remedy}")
        if missing := self._missing():
            raise FileNotFoundError(f"{str(self.path)!r} is incomplete, it lacks {', '.join(missing)}: {remedy}")

    def _missing(self) -> list[str]:
        return [name for name in self.files if not (self.path / name).is_file()]

    def damaged(self, name: str, found: str) -> ValueError:
        """Return the error for a file that is not what it should be."""
        return ValueError(
            f"{str(self.path / name)!r} is damaged ({found}): delete it and get it again, or set download=True."
        )
