"""Images in files: found in a tree of one folder per class, decoded when asked for or once into a cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import numpy
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import RandomResizedCrop

from lightning_prune.datamodules.augmentation import BOX
from lightning_prune.files import written_whole

CACHE_VERSION = 1  # raise it when the same files would give other pixels
AT_ONCE = 1024  # images that are decoded before they are written
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
BoxChoice = Callable[[Image.Image], Box]


@dataclass(frozen=True)
class ImageFiles:
    """Images that are decoded each time they are read.

    Args:
        paths: File of each image, (n,), as from :func:`find_images`.
        targets: Label of each image, (n,).
        size: Height and width in pixels that images get.
        margin: Share of the shorter side that the central square of an evaluation image has, in (0, 1].
        area: Least and greatest share of the image that a training image is a random box of, with a side ratio of 3:4
            to 4:3; None for the central square.

    Note:
        Random boxes: Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6; they are drawn by
        torchvision.
    """

    paths: numpy.ndarray
    targets: Tensor
    size: int
    margin: float = 1.0
    area: tuple[float, float] | None = None

    def read(self, indices: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the images ``indices`` (k,) as bytes (k, 3, size, size), in random boxes if there are numbers."""
        paths = [os.fsdecode(self.paths[index]) for index in indices.tolist()]
        boxes: list[BoxChoice] = [partial(central_box, self.margin)] * len(paths)
        if numbers is not None and self.area is not None:
            boxes = [partial(random_box, self.area, number) for number in numbers[:, BOX].tolist()]
        images = [read_image(path, self.size, box) for path, box in zip(paths, boxes, strict=True)]
        return torch.stack(images)


def find_images(folder: Path, classes: list[str]) -> tuple[numpy.ndarray, Tensor]:
    """Return the files (n,), encoded as the file system does, and labels (n,) of a tree, by class and name."""
    labels = {name: label for label, name in enumerate(classes)}
    found = make_dataset(str(folder), labels, IMG_EXTENSIONS)
    # One array: a list of strings would be copied into every forked worker, as reading it counts references.
    paths = numpy.array([os.fsencode(path) for path, _ in found])
    targets = torch.tensor([label for _, label in found])
    return paths, targets


def read_image(path: str, size: int, choose_box: BoxChoice) -> Tensor:
    """Return a box of an image, scaled to a square, as bytes (3, size, size); grey images get three equal channels.

    JPEG files are decoded at an eighth, a quarter or half of their size where that has enough pixels.

    Args:
        path: The file.
        size: Height and width in pixels of what is returned.
        choose_box: Returns the box, in pixels of the image as it is in the file.

    Raises:
        ValueError: If the file cannot be decoded; names it.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            left, top, right, bottom = choose_box(image)
            enough_width = ceil(size * width / (right - left))
            enough_height = ceil(size * height / (bottom - top))
            image.draft(None, (enough_width, enough_height))
            across = image.width / width
            down = image.height / height
            box = (left * across, top * down, right * across, bottom * down)
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    except Exception as error:  # broken files make Pillow raise errors of many types
        raise ValueError(f"{path!r} cannot be read as an image ({error}): replace or delete it.") from error
    pixels = torch.from_numpy(numpy.array(scaled))  # (size, size, 3)
    return pixels.permute(2, 0, 1)


def central_box(margin: float, image: Image.Image) -> Box:
    """Return the central square whose side is ``margin`` times the shorter one of the image."""
    side = margin * min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    return left, top, left + side, top + side


def random_box(area: tuple[float, float], number: float, image: Image.Image) -> Box:
    """Return a box of random size and place, a function of a random number in [0, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(number * 2**24))  # all the bits that a float32 in [0, 1) has
        top, left, height, width = RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
    return left, top, left + width, top + height


def cached_pixels(paths: numpy.ndarray, size: int, cache: Path, name: str) -> Tensor:
    """Return the central squares of images as bytes (n, 3, size, size), decoded only if the cache lacks them.

    The file is mapped into memory: processes of one machine share it, and it is read from disk once. It is there only
    when it is complete; what was made of other files under this name is deleted.

    Args:
        paths: The files, as from :func:`find_images`.
        size: Height and width in pixels that images get.
        cache: Folder of the cache; it is made if it is not there.
        name: What the images are, which is in the file's name.

    Raises:
        ValueError: If a file cannot be decoded.
        OSError: If the cache cannot be written.
    """
    prefix = f"{name}-{size}px-"
    target = cache / f"{prefix}{_fingerprint(paths)}.npy"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{name}.lock"):  # of two processes that prepare at once, one works and one waits
                if not target.exists():
                    _delete(cache.glob(f".{prefix}*"))  # what killed processes had begun to write
                    _decode(paths, size, target)
                _delete(path for path in cache.glob(f"{prefix}*.npy") if path != target)
        except OSError as error:
            raise OSError(
                f"The decoded images, {len(paths) * 3 * size**2 / 1e6:.1f} MB, could not be written to {str(cache)!r} "
                f"({error.strerror or error}): make room, set cache_dir to another folder, or set in_memory=False."
            ) from error
    return torch.from_numpy(numpy.load(target, mmap_mode="c"))


def _fingerprint(paths: numpy.ndarray) -> str:
    digest = hashlib.sha256(f"version {CACHE_VERSION}".encode())
    for path in paths.tolist():
        facts = os.stat(path)
        digest.update(b"%s\0%d\0%d\0" % (path, facts.st_size, facts.st_mtime_ns))
    return digest.hexdigest()[:16]


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()


def _decode(paths: numpy.ndarray, size: int, target: Path) -> None:
    rank_zero_info(f"Decoding {len(paths)} images once, into {str(target)!r}.")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, size, size)}
    # Written rather than mapped: on a full disk a write fails, whereas a map would end the process.
    with written_whole(target) as unfinished, unfinished.open("wb") as file:
        numpy.lib.format.write_array_header_1_0(file, header)
        for pixels in _decoded(paths, size):
            file.write(pixels.contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _decoded(paths: numpy.ndarray, size: int) -> Iterator[Tensor]:
    names = [os.fsdecode(path) for path in paths]
    central_square = partial(central_box, 1.0)
    read = partial(read_image, size=size, choose_box=central_square)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the interpreter
        for start in range(0, len(names), AT_ONCE):
            yield from pool.map(read, names[start : start + AT_ONCE])
