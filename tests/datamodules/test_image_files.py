"""Decoding, boxes, and the cache: complete or not there."""

import os
import resource
import shutil
from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.datamodules.augmentation import BOX, NUMBERS
from lightning_prune.datamodules.image_files import (
    ImageFiles,
    cached_pixels,
    central_box,
    find_images,
    random_box,
    read_image,
)

WHOLE = partial(central_box, 1.0)


@pytest.fixture
def flag(tmp_path):
    """Write an image of 48 x 24 pixels: left third red, middle third green, right third blue."""
    image = Image.new("RGB", (48, 24), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 24))
    image.paste((0, 0, 255), (32, 0, 48, 24))
    image.save(tmp_path / "flag.png")
    return tmp_path / "flag.png"


def smooth_photo(path, width, height):
    """Write a JPEG file without fine detail, so that any way of scaling it gives nearly the same."""
    y, x = numpy.mgrid[0:height, 0:width]
    waves = [numpy.sin(6 * x / width + phase) * numpy.cos(4 * y / height) for phase in (0, 1, 2)]
    Image.fromarray((127.5 + 120 * numpy.stack(waves, axis=2)).astype(numpy.uint8)).save(path, quality=95)


# ---- decoding ----


def test_image_gets_its_size_by_scaling_and_cutting(flag):
    pixels = read_image(str(flag), 12, WHOLE)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 12, 12)
    # Scaled to half, a third is 8 columns; the cut keeps columns 6 ... 17 of 24: two red, eight green, two blue.
    assert pixels.argmax(dim=0)[6].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_image_of_the_right_size_is_not_touched(tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg")
    expected = numpy.array(Image.open(tmp_path / "0.jpg"))
    assert torch.equal(read_image(str(tmp_path / "0.jpg"), 32, WHOLE), torch.tensor(expected).permute(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1000, 800), (256, 256)])
def test_reduced_decoding_is_scaling_and_cutting_of_torchvision(tmp_path, width, height):
    smooth_photo(tmp_path / "0.jpg", width, height)
    image = v2.functional.pil_to_tensor(Image.open(tmp_path / "0.jpg"))
    expected = v2.Compose([v2.Resize(64, antialias=True), v2.CenterCrop(56)])(image)
    found = read_image(str(tmp_path / "0.jpg"), 56, partial(central_box, 56 / 64))
    assert (found.int() - expected.int()).abs().max() <= 6


def test_large_photo_is_decoded_small(tmp_path, monkeypatch):
    smooth_photo(tmp_path / "0.jpg", 800, 800)
    sizes = []
    original = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: (sizes.append(self.size), original(self, mode))[1])
    for size in (60, 100, 101, 400, 401):
        read_image(str(tmp_path / "0.jpg"), size, WHOLE)
    assert sizes == [(100, 100), (100, 100), (200, 200), (400, 400), (800, 800)]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_kinds_of_images_become_colour(tmp_path, mode):
    name = str(tmp_path / ("0.jpg" if mode == "CMYK" else "0.png"))
    Image.new("L", (8, 8), 255).convert(mode).save(name)
    pixels = read_image(name, 8, WHOLE)
    assert pixels.shape == (3, 8, 8)
    assert (pixels == 255).all()


@pytest.mark.parametrize("name", ["0.jpg", "0.png"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda _: b"no"])
def test_broken_image_is_named(tmp_path, name, damage):
    path = tmp_path / name
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as an image \(.+\): replace or delete it"):
        read_image(str(path), 32, WHOLE)


# ---- random boxes ----


def test_random_boxes_are_those_of_torchvision(flag):
    image = Image.open(flag)
    numbers = torch.rand(2000).tolist()
    found = torch.tensor([random_box((0.08, 1.0), number, image) for number in numbers])
    expected = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in numbers])
    left, top, right, bottom = found.unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 48).all()
    assert (bottom <= 24).all()
    same_order = torch.stack([top, left, bottom - top, right - left], dim=1).double()
    # Means of 2,000 draws; the deviations of top, left, height and width are below 10, so that 1 is 4 of a mean's.
    assert torch.allclose(same_order.mean(0), expected.double().mean(0), atol=1.0)
    assert torch.allclose(same_order.std(0), expected.double().std(0), atol=1.0)


def test_random_box_depends_on_its_number_alone(flag):
    image = Image.open(flag)
    first = random_box((0.08, 1.0), 0.3, image)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert random_box((0.08, 1.0), 0.3, image) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert random_box((0.08, 1.0), 0.4, image) != first


def test_only_training_images_are_in_random_boxes(flag):
    images = ImageFiles(numpy.array([os.fsencode(flag)]), torch.zeros(1), 12, margin=0.5, area=(0.08, 1.0))
    index, numbers = torch.tensor([0]), torch.rand(1, NUMBERS)
    box = partial(random_box, (0.08, 1.0), numbers[0, BOX].item())
    assert torch.equal(images.read(index, numbers)[0], read_image(str(flag), 12, box))
    assert torch.equal(images.read(index, None)[0], read_image(str(flag), 12, partial(central_box, 0.5)))


# ---- the cache ----


def decoded(folder, cache, size=16):
    paths, _ = find_images(folder / "train", ["cat", "dog", "owl"])
    return paths, cached_pixels(paths, size, cache, "train")


def test_cache_holds_the_decoded_images_and_is_made_once(image_root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    paths, pixels = decoded(image_root, cache)
    expected = torch.stack([read_image(os.fsdecode(path), 16, WHOLE) for path in paths])
    assert torch.equal(pixels, expected)
    monkeypatch.setattr("lightning_prune.datamodules.image_files.read_image", None)
    assert torch.equal(decoded(image_root, cache)[1], expected)
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".npy"]


def test_changed_files_are_decoded_again_and_the_old_cache_goes(image_root, tmp_path):
    cache = tmp_path / "cache"
    paths, before = decoded(image_root, cache)
    (first,) = cache.glob("*.npy")
    Image.new("RGB", (40, 36), (1, 2, 3)).save(os.fsdecode(paths[4]))
    _, after = decoded(image_root, cache)
    (second,) = cache.glob("*.npy")
    assert second != first
    assert (after[4] != before[4]).any()
    assert torch.equal(after[5:], before[5:])
    os.unlink(os.fsdecode(paths[4]))
    assert len(decoded(image_root, cache)[1]) == len(before) - 1


def test_each_size_has_its_cache(image_root, tmp_path):
    for size in (16, 20, 16):
        assert decoded(image_root, tmp_path / "cache", size)[1].shape == (30, 3, size, size)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_serving_does_not_write_into_the_cache(image_root, tmp_path):
    _, pixels = decoded(image_root, tmp_path / "cache")
    before = pixels.clone()
    pixels.zero_()
    assert torch.equal(decoded(image_root, tmp_path / "cache")[1], before)


def read_all(data):
    data.setup("fit")
    return list(data.train_dataloader()) + list(data.val_dataloader())


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_image_in_a_tree_is_named_and_leaves_no_cache(image_root, in_memory):
    broken = image_root / "train" / "dog" / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    data = ImageFolderDataModule(str(image_root), in_memory=in_memory)
    with pytest.raises(ValueError, match=r"dog/5\.jpg' cannot be read as an image"):
        read_all(data)
    if in_memory:
        assert [path.suffix for path in (image_root / ".cache").iterdir()] == [".lock"]


def test_full_disk_is_told_in_one_sentence_and_leaves_nothing(image_root, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = tmp_path / "cache"
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # writes fail from there on, as on a full disk
    try:
        with pytest.raises(OSError, match=r" MB, could not be written to .*cache' \(File too large\): make room, set"):
            decoded(image_root, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(decoded(image_root, cache)[1]) == 30


def test_cache_that_cannot_be_made_is_told_with_the_remedy(image_root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be written to .*: make room, set cache_dir to another folder, or"):
        decoded(image_root, tmp_path / "file")


def test_what_a_killed_process_had_written_is_deleted(image_root, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".train-16px-0123456789abcdef-killed.npy").write_bytes(b"x" * 100_000)
    assert len(decoded(image_root, tmp_path / "cache")[1]) == 30
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_two_processes_decode_once(image_root, tmp_path, run_twice, monkeypatch):
    log = tmp_path / "log"

    def logged(path, **settings):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return read_image(path, **settings)

    monkeypatch.setattr("lightning_prune.datamodules.image_files.read_image", logged)
    run_twice(lambda: decoded(image_root, tmp_path / "cache"))
    lines = log.read_text().split()
    assert len(lines) == 30
    assert len(set(lines)) == 1
    shutil.rmtree(tmp_path / "cache")


def test_prepare_data_decodes_every_part(image_root, extra_images):
    extra_images(image_root / "val", 1)
    ImageFolderDataModule(str(image_root)).prepare_data()
    names = sorted(path.name.split("-")[0] for path in (image_root / ".cache").glob("*.npy"))
    assert names == ["test", "train", "val"]
