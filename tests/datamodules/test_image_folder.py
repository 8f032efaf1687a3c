import shutil

import pytest
import torch
from PIL import Image

from lightning_prune.datamodules import ImageFolderDataModule

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def ready(root, **settings):
    data = ImageFolderDataModule(str(root), **settings)
    data.setup("fit")
    data.setup("test")
    return data


def labels_of(part):
    return [label for _, label in part]


def test_facts_are_known_before_setup(image_root):
    data = ImageFolderDataModule(str(image_root), image_size=20)
    assert (data.num_classes, data.input_shape, data.classes) == (3, (3, 20, 20), ["cat", "dog", "owl"])


def test_images_are_split_in_every_class(image_root):
    data = ready(image_root, val_fraction=0.2)
    assert [labels_of(data.train_set).count(label) for label in range(3)] == [8, 8, 8]
    assert [labels_of(data.val_set).count(label) for label in range(3)] == [2, 2, 2]
    assert [labels_of(data.test_set).count(label) for label in range(3)] == [3, 3, 3]
    assert set(data.train_set.indices).isdisjoint(data.val_set.indices)


def test_image_gets_its_size_by_scaling_and_cutting(tmp_path, extra_images):
    extra_images(tmp_path / "train", 2)
    extra_images(tmp_path / "test", 1)
    # Left third red, middle third green, right third blue; scaled to half of its size, a third is 8 columns.
    image = Image.new("RGB", (48, 24), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 24))
    image.paste((0, 0, 255), (32, 0, 48, 24))
    shutil.rmtree(tmp_path / "test" / "cat")
    (tmp_path / "test" / "cat").mkdir()
    image.save(tmp_path / "test" / "cat" / "flag.png")
    data = ready(tmp_path, image_size=12, **PLAIN)
    pixels = data.test_set[0][0]
    assert pixels.shape == (3, 12, 12)
    # The cut keeps columns 6 ... 17 of 24: two red, eight green, two blue.
    assert pixels.argmax(dim=0)[6].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_normalisation_is_per_channel(image_root):
    plain = ready(image_root, **PLAIN).test_set[0][0]
    image = ready(image_root, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)).test_set[0][0]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    assert torch.allclose(image, expected, atol=1e-6)


def test_only_training_images_vary(image_root):
    data = ready(image_root, crop_padding=2)
    for part, varies in ((data.train_set, True), (data.val_set, False), (data.test_set, False)):
        draws = [part[0][0] for _ in range(20)]
        assert any(not torch.equal(draws[0], draw) for draw in draws) is varies


def test_flip_and_crop_can_be_switched_off(tmp_path, extra_images):
    for part in ("train", "test"):
        extra_images(tmp_path / part, 2)
        for path in (tmp_path / part).rglob("*.jpg"):
            Image.open(path).crop((0, 0, 36, 36)).save(path)
    data = ready(tmp_path, image_size=36, crop_padding=0, flip=False)
    assert all(torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(20))
    data = ready(tmp_path, image_size=36, crop_padding=0)
    first = data.train_set[0][0]
    draws = [data.train_set[0][0] for _ in range(20)]
    assert all(torch.equal(draw, first) or torch.equal(draw, first.flip(2)) for draw in draws)
    assert any(torch.equal(draw, first.flip(2)) for draw in draws)


def test_folder_val_replaces_the_split(image_root, extra_images):
    extra_images(image_root / "val", 4)
    data = ready(image_root)
    assert (len(data.train_set), len(data.val_set)) == (30, 12)
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])


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
        ({"val_fraction": 2.0}, r"val_fraction=2.0 is outside \(0, 1\)"),
    ],
)
def test_bad_setting_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(**setting)
