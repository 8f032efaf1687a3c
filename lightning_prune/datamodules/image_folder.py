"""Any data set that lies on disk as one folder of images per class."""

from __future__ import annotations

from pathlib import Path

from torchvision import datasets, transforms

from lightning_prune.datamodules.base import ImageDataModule, LabelledImages, Transform, check_normalisation

NAMED_CLASSES = 3


class ImageFolderDataModule(ImageDataModule):
    """Load images from ``root/train/<class>/`` and ``root/test/<class>/``, normalised.

    If there is a folder ``root/val``, it holds the validation images and no training image is kept for validation.
    Images are read as RGB.

    Args:
        root: Folder that holds ``train`` and ``test``, each with one folder per class, the same classes in both.
        image_size: Height and width in pixels that images get: the shorter side is scaled to it, the rest cut off.
        batch_size: Images per batch and process, at least 1.
        num_workers: Processes that load images.
        val_fraction: Share of the training images that is kept for validation, in (0, 1).
        crop_padding: Pixels by which training images are padded before a random crop; 0 leaves only the crop along the
            longer side.
        flip: Flip half of the training images from left to right.
        mean: Mean of each channel, of pixels in [0, 1]; the default is that of ImageNet.
        std: Standard deviation of each channel.
        seed: Seed of the validation split and of the order.

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
        ...     images, labels = next(iter(data.train_dataloader()))
        ...     data.classes, images.shape
        (['cat', 'dog'], torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        crop_padding: int = 4,
        flip: bool = True,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, val_fraction, seed)
        check_normalisation(mean, std, channels=3)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} is no image: set the height and width in pixels.")
        if crop_padding < 0:
            raise ValueError(f"crop_padding={crop_padding} is negative: set it to 0 for none.")
        self.root = Path(root)
        self.image_size = image_size
        self.crop_padding = crop_padding
        self.flip = flip
        self.mean = mean
        self.std = std
        self.input_shape = (3, image_size, image_size)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels; read from the folder ``train``."""
        return _read_classes(self.root / "train")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; read from the folder ``train``."""
        return len(self.classes)

    def check_files(self) -> None:
        """Refuse a tree in which a folder is missing or empty, or whose parts have different classes."""
        classes = self.classes
        others = ["test", "val"] if (self.root / "val").is_dir() else ["test"]
        for part in others:
            # Labels are positions in the sorted list of classes, so a class that one part lacks would shift them all.
            _compare_classes(self.root, part, set(_read_classes(self.root / part)), set(classes))
        for part in ("train", *others):
            _refuse_empty(self.root / part, classes)

    def load_images(self, train: bool) -> LabelledImages:
        """Return the training or the test images."""
        return datasets.ImageFolder(str(self.root / ("train" if train else "test")))

    def load_validation_images(self) -> LabelledImages | None:
        """Return the images of the folder ``val``, if there is one."""
        folder = self.root / "val"
        return datasets.ImageFolder(str(folder)) if folder.is_dir() else None

    def transform(self, train: bool) -> Transform:
        """Return scaling, crop and normalisation; crop and flip are random for training."""
        size = self.image_size
        if train:
            crop = [transforms.RandomCrop(size, padding=self.crop_padding or None)]
            crop += [transforms.RandomHorizontalFlip()] if self.flip else []
        else:
            crop = [transforms.CenterCrop(size)]
        normalise = [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        return transforms.Compose([transforms.Resize(size), *crop, *normalise])


def _read_classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(folder)!r} does not exist: the images must lie in train/<class>/ and test/<class>/ of the root."
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"{str(folder)!r} has no folders: put the images of each class into one of its own.")
    return classes


def _compare_classes(root: Path, part: str, classes: set[str], train_classes: set[str]) -> None:
    if classes == train_classes:
        return
    only_here, only_train = sorted(classes - train_classes), sorted(train_classes - classes)
    found = [
        f"{_first_few(names)} only in {where}" for names, where in ((only_here, part), (only_train, "train")) if names
    ]
    raise ValueError(
        f"train and {part} in {str(root)!r} have different classes ({'; '.join(found)}): give both the same folders."
    )


def _refuse_empty(folder: Path, classes: list[str]) -> None:
    empty = [name for name in classes if not _has_image(folder / name)]
    if empty:
        raise FileNotFoundError(
            f"{str(folder)!r} has class folders without an image ({_first_few(empty)}): add images, or remove the "
            "folders from every part."
        )


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in datasets.folder.IMG_EXTENSIONS for path in folder.rglob("*"))


def _first_few(names: list[str]) -> str:
    rest = len(names) - NAMED_CLASSES
    return ", ".join(names[:NAMED_CLASSES]) + (f" and {rest} more" if rest > 0 else "")
