import os
import socket
import time
import urllib.request

import numpy
import pytest
import torch
from conftest import write_idx
from torchvision import datasets

from lightning_prune.datamodules import FashionMNISTDataModule, MNISTDataModule

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def ready(module, root, **settings):
    data = module(str(root), **settings)
    data.setup("fit")
    data.setup("test")
    return data


@pytest.mark.parametrize("module", [MNISTDataModule, FashionMNISTDataModule])
def test_images_are_read_and_split(mnist_root, module):
    data = ready(module, mnist_root, val_fraction=0.25)
    # Every pixel of image i is i; a quarter of each class is 1 of 4.
    values = {}
    for name, part in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set)):
        pixels, labels = part.__getitems__(list(range(len(part))))
        assert pixels.shape == (len(part), *data.input_shape)
        assert (pixels == pixels[:, :, :1, :1]).all()
        values[name] = pixels[:, 0, 0, 0].tolist()
        assert labels.tolist() == [value % 10 for value in values[name]]
    assert sorted(values["train"] + values["val"]) == list(range(40))
    assert sorted(value % 10 for value in values["val"]) == list(range(10))
    assert values["test"] == list(range(10))


def test_same_images_as_torchvision(mnist_root):
    expected = datasets.MNIST(mnist_root, train=True)
    images = MNISTDataModule(str(mnist_root)).load_images(train=True)
    assert torch.equal(images.pixels[:, 0], expected.data)
    assert torch.equal(images.targets, expected.targets)


@pytest.mark.parametrize(
    ("module", "mean", "std"), [(MNISTDataModule, 0.1307, 0.3081), (FashionMNISTDataModule, 0.2860, 0.3530)]
)
def test_normalised_values(mnist_root, module, mean, std):
    data = ready(module, mnist_root)
    images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    assert torch.allclose(images[5], torch.full((1, 28, 28), (5 / 255 - mean) / std))
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_each_missing_file_is_named_at_any_stage(mnist_root, missing, stage):
    (mnist_root / "MNIST" / "raw" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"raw' is incomplete, it lacks {missing}: put .* or set download=True"):
        MNISTDataModule(str(mnist_root)).setup(stage)


def test_missing_folder_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw' does not exist: put the unpacked files of FashionMNIST"):
        FashionMNISTDataModule(str(tmp_path)).setup("fit")


def test_truncated_file_is_named(mnist_root):
    path = mnist_root / "MNIST" / "raw" / FILES[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{FILES[0]}' is damaged \(31276 bytes instead of 31376\): delete it"):
        MNISTDataModule(str(mnist_root)).setup("fit")


@pytest.mark.parametrize("content", [b"", b"\0\0", b"<html>not the file, but a page</html>"])
def test_foreign_file_is_named(mnist_root, content):
    (mnist_root / "MNIST" / "raw" / FILES[2]).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FILES[2]}' is damaged \(it does not begin as an IDX file"):
        MNISTDataModule(str(mnist_root)).setup("test")


def test_labels_for_other_images_are_refused(mnist_root):
    write_idx(mnist_root / "MNIST" / "raw" / FILES[1], numpy.zeros(39))
    with pytest.raises(ValueError, match=rf"{FILES[1]}' is damaged \(39 labels for 40 images\)"):
        MNISTDataModule(str(mnist_root)).setup("fit")


def test_images_of_another_size_are_refused(mnist_root):
    write_idx(mnist_root / "MNIST" / "raw" / FILES[0], numpy.zeros((40, 20, 28)))
    with pytest.raises(ValueError, match=rf"{FILES[0]}' is damaged \(images of 20 x 28 pixels\)"):
        MNISTDataModule(str(mnist_root)).setup("fit")


def test_label_out_of_range_is_refused(mnist_root):
    labels = numpy.arange(40) % 10
    labels[7] = 12
    write_idx(mnist_root / "MNIST" / "raw" / FILES[1], labels)
    with pytest.raises(ValueError, match=r"Label 12 of training image 7 is outside 0 \.\.\. 9"):
        MNISTDataModule(str(mnist_root)).setup("fit")


def test_download_happens_only_if_asked_for_and_needed(mnist_root, monkeypatch):
    calls = []

    class Source(datasets.MNIST):
        def __init__(self, root, **settings):
            calls.append((root, settings))

    monkeypatch.setattr(MNISTDataModule, "source", Source)
    MNISTDataModule(str(mnist_root), download=True).prepare_data()
    (mnist_root / "MNIST" / "raw" / FILES[0]).unlink()
    MNISTDataModule(str(mnist_root)).prepare_data()
    assert calls == []
    MNISTDataModule(str(mnist_root), download=True).prepare_data()
    assert calls == [(mnist_root, {"download": True})]


def test_no_network_is_told_with_the_files_and_their_place(tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise urllib.request.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(ConnectionError, match=r"MNIST could not be downloaded.*Name or service not known") as caught:
        MNISTDataModule(str(tmp_path), download=True).prepare_data()
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in FILES)
    assert repr(str(tmp_path / "MNIST" / "raw")) in message


class SlowSource(datasets.MNIST):
    """Write the process's number into the files, slowly, if they are not all there."""

    def __init__(self, root, download):
        raw = root / "MNIST" / "raw"
        if not all((raw / name).exists() for name in FILES):
            raw.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                time.sleep(0.05)
                (raw / name).write_text(str(os.getpid()))


def test_two_processes_download_once(tmp_path, monkeypatch, run_twice):
    monkeypatch.setattr(MNISTDataModule, "source", SlowSource)
    run_twice(MNISTDataModule(str(tmp_path), download=True).prepare_data)
    writers = {(tmp_path / "MNIST" / "raw" / name).read_text() for name in FILES}
    assert len(writers) == 1
