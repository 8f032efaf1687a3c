"""Any data set that lies on disk as one folder of images per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_prune.datamodules.augmentation import Augmentation
from lightning_prune.datamodules.base import ImageDataModule
from lightning_prune.datamodules.image_files import ImageFiles, cached_pixels, find_images
from lightning_prune.datamodules.loading import LabelledImages, PixelImages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMED_CLASSES = 3


class ImageFolderDataModule(ImageDataModule):
    """Load images from ``root/train/<class>/`` and ``root/test/<class>/``, normalised.

    If there is a folder ``root/val``, it has the validation images and no training image is kept for validation.
    Images are read as RGB, grey ones with three equal channels, and of each the central square is taken.

    Args:
        root: Folder of ``train`` and ``test``, each with one folder per class, the same classes in both.
        image_size: Height and width in pixels that images get: the shorter side is scaled to it, the rest cut off.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images; 0 is fastest with ``in_memory``.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        in_memory: Decode all images once, into a cache of n * 3 * image_size**2 bytes that serves them from memory.
            Without it, every image is decoded each time, in the workers.
        cache_dir: Folder of that cache; default ``.cache`` in ``root``.
        crop_padding: Pixels by which training images are padded before a random crop, 0 for none.
        flip: Flip half of the training images from left to right.
        cutout: Side in pixels of the square that is cut out of each training image, 0 for none.
        mean: Mean of each channel, of pixels in [0, 1]; the default is that of ImageNet.
        std: Standard deviation of each channel.
        seed: Seed of the validation split, the order and the augmentation, at least 0.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from lightning_prune.datamodules import ImageFolderDataModule
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2", "test/cat/1", "test/dog/1"):
        ...         Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (40, 50)).save(Path(root, name + ".png"))
        ...     data = ImageFolderDataModule(root, image_size=32, batch_size=2)
        ...     data.setup("fit")
        ...     images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
        ...     data.classes, images.shape
        (['cat', 'dog'], torch.Size([2, 3, 32, 32]))
    """

    test_split = "test"

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        in_memory: bool = True,
        cache_dir: str | None = None,
        crop_padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size={image_size} is no image: set the height and width in pixels.")
        self.input_shape = (3, image_size, image_size)
        augmentation = Augmentation(mean, std, crop_padding, flip, cutout)
        super().__init__(batch_size, num_workers, val_fraction, seed, augmentation)
        self.root = Path(root)
        self.image_size = image_size
        self.in_memory = in_memory
        self.cache_dir = Path(cache_dir) if cache_dir else self.root / ".cache"

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels; read from the folder ``train``."""
        return _read_classes(self.root, "train", self.test_split)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; read from the folder ``train``."""
        return len(self.classes)

    @property
    def _other_splits(self) -> list[str]:
        return ["val", self.test_split] if self._has_validation_split else [self.test_split]

    @property
    def _has_validation_split(self) -> bool:
        return self.test_split != "val" and (self.root / "val").is_dir()

    def prepare_data(self) -> None:
        """Decode all images, on one process, if they are to be in memory and are not in the cache."""
        if self.in_memory:
            self.check_files()
            for split in ("train", *self._other_splits):
                self._load_split(split)

    def check_files(self) -> None:
        """Refuse a tree in which a folder is missing or empty, or whose folders have different classes."""
        classes = self.classes
        for split in self._other_splits:
            # Labels are positions in the sorted list of classes, so a class that one folder lacks would shift them all.
            found = _read_classes(self.root, split, self.test_split)
            _compare_classes(self.root, split, set(found), set(classes))
        for split in ("train", *self._other_splits):
            _refuse_empty(self.root / split, classes)

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        return self._load_split("train" if train else self.test_split)

    def load_validation_images(self) -> LabelledImages | None:
        """Return the images of the folder ``val``, if there is one."""
        return self._load_split("val") if self._has_validation_split else None

    def _load_split(self, split: str) -> LabelledImages:
        paths, targets = find_images(self.root / split, self.classes)
        if self.in_memory:
            return PixelImages(cached_pixels(paths, self.image_size, self.cache_dir, split), targets)
        return self.files(paths, targets)

    def files(self, paths: numpy.ndarray, targets: Tensor) -> ImageFiles:
        """Return images that are decoded when they are asked for."""
        return ImageFiles(paths, targets, self.image_size)


def _read_classes(root: Path, split: str, test_split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} does not exist: the images must lie in train/<class>/ and {test_split}/<class>/ of the "
            "root."
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"{str(folder)!r} has no folders: put the images of each class into one of its own.")
    return classes


def _compare_classes(root: Path, split: str, classes: set[str], train_classes: set[str]) -> None:
    if classes == train_classes:
        return
    only_in = {split: sorted(classes - train_classes), "train": sorted(train_classes - classes)}
    differences = [f"{_first_few(names)} only in {where}" for where, names in only_in.items() if names]
    raise ValueError(
        f"train and {split} in {str(root)!r} have different classes ({'; '.join(differences)}): give both the same "
        "folders."
    )


def _refuse_empty(folder: Path, classes: list[str]) -> None:
    empty = [name for name in classes if not _has_image(folder / name)]
    if empty:
        raise FileNotFoundError(
            f"{str(folder)!r} has class folders without an image ({_first_few(empty)}): add images, or remove the "
            "folders everywhere."
        )


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))


def _first_few(names: list[str]) -> str:
    named = ", ".join(names[:NAMED_CLASSES])
    unnamed = len(names) - NAMED_CLASSES
    return f"{named} and {unnamed} more" if unnamed > 0 else named
