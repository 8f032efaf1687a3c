"""Batched augmentation against slices taken by hand, and its distribution against torchvision's pipeline per image."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from lightning_prune.datamodules.augmentation import (
    CUTOUT,
    NUMBERS,
    Augmentation,
    crop,
    cut_out,
    flip,
    normalise,
)

LARGEST = 1 - 2**-24  # that torch.rand can draw


def random_pixels(*shape):
    return torch.randint(1, 256, shape, dtype=torch.uint8)


def crop_one(image, padding, top, left):
    """Cut a window out of one padded image, pixel by pixel."""
    height, width = image.shape[1:]
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row, column = y + top - padding, x + left - padding
            if 0 <= row < height and 0 <= column < width:
                result[:, y, x] = image[:, row, column]
    return result


# ---- each step, by hand ----


def test_crop_takes_the_window_of_each_number():
    pixels = random_pixels(25, 2, 5, 4)
    places = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    found = crop(pixels, 2, (places + 0.5) / 5)
    for image, (top, left), result in zip(pixels, places.tolist(), found, strict=True):
        assert torch.equal(result, crop_one(image, 2, top, left))


@given(padding=st.integers(1, 100))
@settings(deadline=None)
def test_extreme_numbers_stay_in_the_padded_image(padding):
    pixels = random_pixels(2, 1, 3, 3)
    found = crop(pixels, padding, torch.tensor([[0.0, LARGEST], [LARGEST, 0.0]]))
    assert torch.equal(found[0], crop_one(pixels[0], padding, 0, 2 * padding))
    assert torch.equal(found[1], crop_one(pixels[1], padding, 2 * padding, 0))


def test_flip_turns_images_with_a_number_below_a_half():
    pixels = random_pixels(4, 3, 2, 5)
    found = flip(pixels, torch.tensor([0.0, 0.49, 0.5, LARGEST]))
    assert torch.equal(found[:2], pixels[:2, :, :, [4, 3, 2, 1, 0]])
    assert torch.equal(found[2:], pixels[2:])


def test_normalise_is_that_of_torchvision():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(pixels)
    assert torch.allclose(normalise(pixels, mean, std), expected, atol=1e-6)


def test_cutout_by_hand():
    images = torch.ones(3, 2, 4, 5)
    # Centres (0, 0), (2, 3) and (3, 4): rows and columns centre - 1 and centre, as far as they are in the image.
    found = cut_out(images, 2, torch.tensor([[0.0, 0.0], [0.5, 0.6], [LARGEST, LARGEST]]))
    holes = [set(map(tuple, (image[0] == 0).nonzero().tolist())) for image in found]
    assert holes == [{(0, 0)}, {(1, 2), (1, 3), (2, 2), (2, 3)}, {(2, 3), (2, 4), (3, 3), (3, 4)}]
    assert torch.equal(found[:, 0], found[:, 1])


def test_cutout_sets_what_the_mean_becomes():
    pixels = random_pixels(6, 1, 8, 8)
    numbers = torch.rand(6, NUMBERS)
    whole = Augmentation((0.5,), (0.2,))(pixels, numbers)
    cut = Augmentation((0.5,), (0.2,), cutout=3)(pixels, numbers)
    hole = cut_out(torch.ones(6, 1, 8, 8), 3, numbers[:, CUTOUT]) == 0
    assert torch.equal(cut, whole.masked_fill(hole, 0.0))


# ---- the whole, and its distribution ----


def test_every_image_has_its_own_randomness_whatever_the_batch():
    pixels, numbers = random_pixels(8, 3, 6, 6), torch.rand(8, NUMBERS)
    augment = Augmentation((0.5,) * 3, (0.5,) * 3, crop_padding=2, flip=True, cutout=2)
    together = augment(pixels, numbers)
    alone = torch.cat([augment(pixels[i : i + 1], numbers[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)
    same = augment(pixels[:1].expand(64, -1, -1, -1), torch.rand(64, NUMBERS))
    assert len(same.flatten(1).unique(dim=0)) > 30


def test_without_numbers_images_are_only_normalised():
    pixels = random_pixels(3, 1, 6, 6)
    augment = Augmentation((0.5,), (0.25,), crop_padding=2, flip=True, cutout=2)
    assert torch.equal(augment(pixels), normalise(pixels, (0.5,), (0.25,)))
    assert torch.equal(pixels, pixels.clone())


def chi_square(counts, outcomes, draws):
    expected = draws / outcomes
    return sum((count - expected) ** 2 / expected for count in counts.values())


def test_distribution_is_that_of_the_pipeline_per_image():
    # All 5 x 5 windows and 2 directions of this image differ, so a result tells which of 50 outcomes it is.
    image = torch.arange(1, 37, dtype=torch.uint8).view(1, 6, 6)
    draws = 5000
    pipeline = v2.Compose(
        [v2.RandomCrop(6, padding=2), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    ours = Augmentation((0.0,), (1.0,), crop_padding=2, flip=True)
    batch = ours(image.expand(draws, -1, -1, -1), torch.rand(draws, NUMBERS))

    def outcome(result):
        return tuple((result * 255).round().int().flatten().tolist())

    found = Counter(outcome(result) for result in batch)
    expected = Counter(outcome(pipeline(image)) for _ in range(draws))
    assert set(found) == set(expected)
    assert len(found) == 50
    # 49 degrees of freedom: above 103 in one of 100,000 cases.
    assert chi_square(expected, 50, draws) < 103
    assert chi_square(found, 50, draws) < 103


def test_cutout_covers_each_pixel_as_often_as_in_the_paper():
    draws, size, length = 20_000, 3, 6
    found = (cut_out(torch.ones(draws, 1, length, length), size, torch.rand(draws, 2)) == 0).double().mean(0)[0]
    # A row is covered by the centres 0 ... 1 after it and 1 before it, as far as there are such.
    row = torch.tensor([sum(c - 1 <= y < c + 2 for c in range(length)) / length for y in range(length)])
    assert torch.allclose(found, torch.outer(row, row).double(), atol=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"crop_padding": -1}, "crop_padding=-1 is negative: set it to 0"),
        ({"cutout": -2}, "cutout=-2 is negative: set it to 0"),
        ({"std": (0.0,)}, r"std=\(0.0,\) must be above 0"),
        ({"mean": (0.5, 0.5)}, "mean has 2 and std 1 values"),
    ],
)
def test_bad_setting_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"mean": (0.5,), "std": (0.5,)} | setting))
