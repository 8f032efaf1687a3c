"""Pictures that stand in for data sets, written where a project looks for its files."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64


def picture(number: int, size: int = SIZE, channels: int = 3) -> np.ndarray:
    """Return a (size, size, channels) picture of noise with a bright square in the corner that the number says."""
    pixels = np.random.default_rng(number).integers(0, 128, (size, size, channels), dtype=np.uint8)
    top, left, side = square(number, size)
    pixels[top : top + side, left : left + side] += 100
    return pixels


def square(number: int, size: int = SIZE) -> tuple[int, int, int]:
    """Return the top, the left and the side of the square of a picture."""
    corner = number % 4
    return size // 8 + (corner // 2) * size // 2, size // 8 + (corner % 2) * size // 2, size // 4


def mask(number: int, size: int = SIZE) -> np.ndarray:
    """Return a (size, size) mask: what is inside the square has its class, from 1."""
    classes = np.zeros((size, size), np.uint8)
    top, left, side = square(number, size)
    classes[top : top + side, left : left + side] = 1 + number % 4
    return classes


def write(path: Path, pixels: np.ndarray) -> None:
    """Write a picture, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)
