"""Tiny data sets in the layouts that the data modules read."""

import hashlib
import pickle
import struct

import numpy
import pytest
import torch
from PIL import Image
from torchvision import datasets

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute in one thread: these networks are tiny, and threads that wait for a busy core cost far more than work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_idx(path, values):
    """Write an array of bytes in the format of the MNIST files."""
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(numpy.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """Write 40 training and 10 test images; every pixel of image i is i, its label i modulo 10."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 10)):
        values = numpy.arange(count)
        write_idx(raw / f"{name}-labels-idx1-ubyte", values % 10)
        write_idx(raw / f"{name}-images-idx3-ubyte", numpy.tile(values[:, None, None], (1, 28, 28)))
    return tmp_path


@pytest.fixture
def cifar10_root(tmp_path, monkeypatch):
    """Write 20 images per file, grey value = position; torchvision is told the checksums of these files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    checksums = {}
    for start, name in enumerate([f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]):
        values = numpy.arange(20 * start, 20 * start + 20, dtype=numpy.uint8)
        pixels = numpy.tile(values[:, None], (1, 3072))
        content = pickle.dumps({"data": pixels, "labels": [int(value) % 10 for value in values]})
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [[f"data_batch_{i}", checksums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {**datasets.CIFAR10.meta, "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


@pytest.fixture
def image_root(tmp_path):
    """Write a tree of train (10 images per class) and test (3 per class), 40x36 pixels, of random colours."""
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 3)
    return tmp_path


def write_images(folder, count, classes=CLASSES):
    generator = numpy.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (36, 40, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


@pytest.fixture
def extra_images():
    """Return the function that writes further parts of an image tree."""
    return write_images
