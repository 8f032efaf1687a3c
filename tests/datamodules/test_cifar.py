import pytest
import torch
from torchvision import datasets

from lightning_prune.datamodules import CIFAR10DataModule, CIFAR100DataModule


def ready(module, root, **settings):
    data = module(str(root), **settings)
    data.setup("fit")
    data.setup("test")
    return data


@pytest.mark.parametrize(("module", "files"), [(CIFAR10DataModule, 6), (CIFAR100DataModule, 2)])
def test_images_are_read_and_split(cifar_root, module, files):
    data = ready(module, cifar_root, val_fraction=0.5)
    values = []
    for part in (data.train_set, data.val_set, data.test_set):
        pixels, labels = part.__getitems__(list(range(len(part))))
        assert pixels.shape == (len(part), *data.input_shape)
        assert (pixels == pixels[:, :1, :1, :1]).all()
        assert (pixels[:, 0, 0, 0] % 10 * (module.num_classes // 10) == labels).all()
        values.append(pixels[:, 0, 0, 0].tolist())
    assert sorted(values[0] + values[1]) == list(range(20 * files - 20))
    assert values[2] == list(range(20 * files - 20, 20 * files))


@pytest.mark.parametrize(
    ("module", "source"), [(CIFAR10DataModule, datasets.CIFAR10), (CIFAR100DataModule, datasets.CIFAR100)]
)
def test_same_images_as_torchvision(cifar_root, monkeypatch, module, source):
    monkeypatch.setattr(source, "_load_meta", lambda self: None)  # the names of the classes, which nobody needs
    for train in (True, False):
        expected, images = source(cifar_root, train=train), module(str(cifar_root)).load_images(train)
        assert torch.equal(images.pixels, torch.from_numpy(expected.data).permute(0, 3, 1, 2))
        assert images.targets.tolist() == expected.targets


def test_usual_augmentation_and_what_replaces_it(cifar_root):
    usual = CIFAR10DataModule(str(cifar_root)).augmentation
    assert (usual.crop_padding, usual.flip, usual.cutout) == (4, True, 0)
    other = CIFAR100DataModule(str(cifar_root), crop_padding=0, flip=False, cutout=8, std=(1.0, 1.0, 1.0)).augmentation
    assert (other.crop_padding, other.flip, other.cutout, other.std) == (0, False, 8, (1.0, 1.0, 1.0))
    assert other.mean == CIFAR100DataModule.usual.mean != CIFAR10DataModule.usual.mean


def test_only_training_batches_are_augmented(cifar_root):
    data = ready(CIFAR10DataModule, cifar_root, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), batch_size=90)
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
    bright = images[images.amax(dim=(1, 2, 3)) > 0.1]
    # Black shows at the left, the right edge or neither (4 of 9 places each, 1 of 9), never at both.
    black = {((image[:, :, 0] == 0).all().item(), (image[:, :, -1] == 0).all().item()) for image in bright}
    assert black == {(True, False), (False, True), (False, False)}
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, _ = data.on_after_batch_transfer(next(iter(loader)))
        assert (images == images[:, :1, :1, :1]).all()


@pytest.mark.parametrize("missing", ["data_batch_3", "test_batch"])
def test_missing_file_is_named(cifar_root, missing):
    (cifar_root / "cifar-10-batches-py" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"-py' is incomplete, it lacks {missing}: put .* or set download=True"):
        CIFAR10DataModule(str(cifar_root)).setup("fit")


def test_missing_folder_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"100-python' does not exist: put the unpacked files of CIFAR100"):
        CIFAR100DataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("change", [lambda content: content + b"x", lambda content: content[:-50]])
def test_damaged_file_is_named(cifar_root, change):
    path = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"batch_2' is damaged \(its MD5 sum is not the published one\): delete it"):
        CIFAR10DataModule(str(cifar_root)).setup("fit")


def test_bad_normalisation_is_refused():
    with pytest.raises(ValueError, match="mean has 1 and std 3 values"):
        CIFAR10DataModule(mean=(0.5,))
    with pytest.raises(ValueError, match="mean and std have 1 values: give 3 of each"):
        CIFAR10DataModule(mean=(0.5,), std=(0.5,))
