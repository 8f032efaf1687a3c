import pytest
import torch
from torchvision import datasets

from lightning_prune.datamodules import CIFAR10DataModule

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def ready(root, **settings):
    data = CIFAR10DataModule(str(root), **settings)
    data.setup("fit")
    data.setup("test")
    return data


def grey(image):
    return round(image[0, 16, 16].item() * 255)


def test_images_are_read_and_split(cifar10_root):
    data = ready(cifar10_root, val_fraction=0.2, augment=False, **PLAIN)
    train, val, test = ([grey(image) for image, _ in part] for part in (data.train_set, data.val_set, data.test_set))
    assert sorted(train + val) == list(range(100))
    assert sorted(value % 10 for value in val) == sorted(2 * list(range(10)))
    assert test == list(range(100, 120))
    for part, values in ((data.train_set, train), (data.val_set, val), (data.test_set, test)):
        assert [label for _, label in part] == [value % 10 for value in values]
        assert part[0][0].shape == data.input_shape


def test_normalisation_is_per_channel(cifar10_root):
    data = ready(cifar10_root, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    value = 100 / 255
    expected = torch.tensor([(value - 0.1) / 0.5, (value - 0.2) / 0.25, value - 0.3])
    assert torch.allclose(data.test_set[0][0][:, 0, 0], expected)


def test_augmentation_crops_training_images_only(cifar10_root):
    data = ready(cifar10_root, **PLAIN)
    # Take a bright image, so that the black padding shows at its left or its right edge, or at neither.
    index = next(index for index, (image, _) in enumerate(data.train_set) if grey(image) > 50)
    draws = [data.train_set[index][0] for _ in range(40)]
    black_edges = {((image[:, :, 0] == 0).all().item(), (image[:, :, -1] == 0).all().item()) for image in draws}
    assert {(True, False), (False, True)} <= black_edges
    assert (True, True) not in black_edges
    for part in (data.val_set, data.test_set):
        assert all((image == image[0, 0, 0]).all() for image, _ in part)


@pytest.mark.parametrize("missing", ["data_batch_3", "test_batch", "batches.meta"])
def test_missing_file_is_named(cifar10_root, missing):
    (cifar10_root / "cifar-10-batches-py" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"-py' is incomplete, it lacks {missing}: put .* or set download=True"):
        CIFAR10DataModule(str(cifar10_root)).setup("fit")


def test_missing_folder_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"-py' does not exist: put the unpacked Python version of CIFAR-10"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")


def test_damaged_file_is_refused(cifar10_root):
    with open(cifar10_root / "cifar-10-batches-py" / "data_batch_2", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="is damaged: delete the folder and set download=True"):
        CIFAR10DataModule(str(cifar10_root)).setup("fit")


def test_bad_normalisation_is_refused():
    with pytest.raises(ValueError, match="mean has 1 and std 3 values: give 3"):
        CIFAR10DataModule(mean=(0.5,))


def test_download_happens_only_if_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "CIFAR10", lambda root, **settings: calls.append((root, settings)))
    CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert calls == []
    CIFAR10DataModule(str(tmp_path), download=True).prepare_data()
    assert calls == [(tmp_path, {"download": True})]
