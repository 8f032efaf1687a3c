import shutil

import pytest
import torch
from PIL import Image

from lightning_prune.datamodules import ImageFolderDataModule


def ready(root, **settings):
    data = ImageFolderDataModule(str(root), **settings)
    data.setup("fit")
    data.setup("test")
    return data


def labels_of(part):
    return part.images.targets[part.indices].tolist()


def test_facts_are_known_before_setup(image_root):
    data = ImageFolderDataModule(str(image_root), image_size=20)
    assert (data.num_classes, data.input_shape, data.classes) == (3, (3, 20, 20), ["cat", "dog", "owl"])


def test_images_are_split_in_every_class(image_root):
    data = ready(image_root, val_fraction=0.2)
    assert [labels_of(data.train_set).count(label) for label in range(3)] == [8, 8, 8]
    assert [labels_of(data.val_set).count(label) for label in range(3)] == [2, 2, 2]
    assert [labels_of(data.test_set).count(label) for label in range(3)] == [3, 3, 3]
    assert set(data.train_set.indices.tolist()).isdisjoint(data.val_set.indices.tolist())


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_belong_to_the_labels_of_their_folders(tmp_path, in_memory):
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for part in ("train", "test"):
        for name, colour in colours.items():
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (9, 8), colour).save(tmp_path / part / name / f"{number}.png")
    data = ready(tmp_path, image_size=8, in_memory=in_memory)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for pixels, labels, *_ in loader:
            assert torch.equal(pixels[:, :, 4, 4].argmax(dim=1), 2 - labels)


def test_memory_and_files_give_the_same_batches(image_root):
    memory, files = ready(image_root), ready(image_root, in_memory=False)
    helped = ready(image_root, in_memory=False, num_workers=1)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for batches in zip(*(getattr(data, loader)() for data in (memory, files, helped)), strict=True):
            for parts in zip(*batches, strict=True):
                assert torch.equal(parts[0], parts[1])
                assert torch.equal(parts[0], parts[2])


def test_only_training_batches_vary(image_root):
    data = ready(image_root, crop_padding=2)
    for loader, varies in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        epochs = []
        for epoch in (0, 1):
            if varies:
                loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([data.on_after_batch_transfer(batch)[0] for batch in loader]))
        assert (epochs[0].flatten(1).sort(dim=0)[0] != epochs[1].flatten(1).sort(dim=0)[0]).any() == varies


def test_folder_val_replaces_the_split(image_root, extra_images):
    extra_images(image_root / "val", 4)
    data = ready(image_root)
    assert (len(data.train_set), len(data.val_set)) == (30, 12)
    assert data.val_set.images is not data.train_set.images
    assert next(iter(data.val_dataloader()))[0].shape == (12, 3, 32, 32)


def test_two_class_folder_for_transfer(tmp_path, extra_images):
    for part, count in (("train", 10), ("test", 2)):
        extra_images(tmp_path / part, count, classes=["cat", "dog"])
    data = ready(tmp_path, image_size=224, in_memory=False, batch_size=4)
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
    assert images.shape == (4, 3, 224, 224)
    assert set(labels.tolist()) <= {0, 1}


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part_is_named_with_the_layout(image_root, part):
    shutil.rmtree(image_root / part)
    message = rf"{part}' does not exist: the images must lie in train/<class>/ and test/<class>/ of the root"
    with pytest.raises(FileNotFoundError, match=message):
        ImageFolderDataModule(str(image_root)).setup("fit")


def test_number_of_classes_of_a_missing_folder_is_refused_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="train' does not exist: the images must lie in"):
        _ = ImageFolderDataModule(str(tmp_path)).num_classes


def test_images_without_class_folders_are_refused(image_root):
    shutil.rmtree(image_root / "train")
    (image_root / "train").mkdir()
    (image_root / "train" / "0.jpg").touch()
    with pytest.raises(FileNotFoundError, match="train' has no folders: put the images of each class into one"):
        ImageFolderDataModule(str(image_root)).setup("fit")


@pytest.mark.parametrize("part", ["test", "val"])
def test_class_that_training_lacks_is_refused(image_root, extra_images, part):
    if part == "val":
        extra_images(image_root / "val", 1)
    extra_images(image_root / part, 1, classes=["bat"])
    with pytest.raises(
        ValueError, match=rf"train and {part} in .* different classes \(bat only in {part}\): give both"
    ):
        ImageFolderDataModule(str(image_root)).setup("fit")


def test_class_that_test_lacks_is_refused(image_root):
    shutil.rmtree(image_root / "test" / "dog")
    with pytest.raises(ValueError, match=r"train and test in .* different classes \(dog only in train\)"):
        ImageFolderDataModule(str(image_root)).setup("fit")


def test_many_different_classes_are_counted(image_root, extra_images):
    extra_images(image_root / "test", 1, classes=["a", "b", "c", "d", "e"])
    shutil.rmtree(image_root / "test" / "dog")
    with pytest.raises(ValueError, match=r"\(a, b, c and 2 more only in test; dog only in train\)"):
        ImageFolderDataModule(str(image_root)).setup("fit")


@pytest.mark.parametrize("part", ["train", "test", "val"])
def test_empty_class_folder_is_refused(image_root, extra_images, part):
    if part == "val":
        extra_images(image_root / "val", 1)
    for path in (image_root / part / "dog").iterdir():
        path.unlink()
    (image_root / part / "dog" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"{part}' has class folders without an image \(dog\): add images"):
        ImageFolderDataModule(str(image_root)).setup("fit")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 0}, "image_size=0 is no image: set the height and width"),
        ({"crop_padding": -1}, "crop_padding=-1 is negative: set it to 0"),
        ({"std": (1.0, 0.0, 1.0)}, r"std=\(1.0, 0.0, 1.0\) must be above 0"),
        ({"cutout": -1}, "cutout=-1 is negative: set it to 0"),
        ({"val_fraction": 2.0}, r"val_fraction=2.0 is outside \(0, 1\)"),
    ],
)
def test_bad_setting_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(**setting)
