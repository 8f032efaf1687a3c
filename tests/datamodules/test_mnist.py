import pytest
import torch
from torchvision import datasets

from lightning_prune.datamodules import MNISTDataModule

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def test_images_are_read_normalised_and_split(mnist_root):
    data = MNISTDataModule(str(mnist_root), val_fraction=0.25)
    data.setup("fit")
    data.setup("test")
    # Pixel i of image i, divided by 255 and normalised; a quarter of each class is 1 of 4.
    values = {}
    for name, part in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set)):
        assert part[0][0].shape == data.input_shape
        values[name] = [round(((image * 0.3081) + 0.1307)[0, 0, 0].item() * 255) for image, _ in part]
        assert [label for _, label in part] == [value % 10 for value in values[name]]
    assert sorted(values["train"] + values["val"]) == list(range(40))
    assert sorted(value % 10 for value in values["val"]) == list(range(10))
    assert values["test"] == list(range(10))


def test_normalised_values(mnist_root):
    data = MNISTDataModule(str(mnist_root))
    data.setup("test")
    assert torch.allclose(data.test_set[5][0], torch.full((1, 28, 28), (5 / 255 - 0.1307) / 0.3081))


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_each_missing_file_is_named_at_any_stage(mnist_root, missing, stage):
    (mnist_root / "MNIST" / "raw" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"raw' is incomplete, it lacks {missing}: put .* or set download=True"):
        MNISTDataModule(str(mnist_root)).setup(stage)


def test_missing_folder_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw' does not exist: put the unpacked files of MNIST there"):
        MNISTDataModule(str(tmp_path)).setup("fit")


def test_download_happens_only_if_asked_for(mnist_root, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, **settings: calls.append((root, settings)))
    MNISTDataModule(str(mnist_root)).prepare_data()
    assert calls == []
    MNISTDataModule(str(mnist_root), download=True).prepare_data()
    assert calls == [(mnist_root, {"download": True})]
