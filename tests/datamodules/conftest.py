"""Tiny data sets in the layouts that the data modules read."""

import hashlib
import multiprocessing
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
    write_mnist(tmp_path / "MNIST" / "raw")
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    return tmp_path


def write_mnist(raw):
    raw.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 10)):
        values = numpy.arange(count)
        write_idx(raw / f"{name}-labels-idx1-ubyte", values % 10)
        write_idx(raw / f"{name}-images-idx3-ubyte", numpy.tile(values[:, None, None], (1, 28, 28)))


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Write both CIFARs, 20 images per file, all of ten classes; every pixel of an image is its position.

    torchvision is told the checksums of these files.
    """
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels", 10)
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR100, "fine_labels", 100)
    return tmp_path


def write_cifar(root, monkeypatch, source, labels_key, classes):
    (root / source.base_folder).mkdir()
    start = 0
    for part in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(source, part):
            values = numpy.arange(start, start + 20, dtype=numpy.uint8)
            labels = [int(value) % 10 * (classes // 10) for value in values]
            content = pickle.dumps({"data": numpy.tile(values[:, None], (1, 3072)), labels_key: labels}, 2)
            for key in ("data", labels_key):  # as Python 2 wrote them in the published files: strings of bytes
                size = len(key).to_bytes(4, "little")
                content = content.replace(b"X" + size + key.encode(), b"U" + size[:1] + key.encode())
            (root / source.base_folder / name).write_bytes(content)
            entries.append([name, hashlib.md5(content).hexdigest()])
            start += 20
        monkeypatch.setattr(source, part, entries)


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


@pytest.fixture
def run_twice():
    """Return the function that runs another one in two processes at once, and fails if either does."""

    def run(function):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=function) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        assert [process.exitcode for process in processes] == [0, 0]

    return run
