import sys

import numpy
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_prune.datamodules import DigitsDataModule


def ready(**settings):
    data = DigitsDataModule(**settings)
    data.setup("fit")
    data.setup("test")
    return data


def stack(part):
    return torch.stack([image for image, _ in part])


def as_rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_images_are_those_of_scikit_learn_scaled_to_one():
    data = ready()
    images = torch.cat([stack(data.train_set), stack(data.val_set), stack(data.test_set)])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert as_rows(images) == as_rows(torch.tensor(load_digits().images / 16))


def test_labels_belong_to_their_images():
    digits = load_digits()
    labels = {image.tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    for image, label in ready().test_set:
        assert type(label) is int
        assert labels[(image[0].numpy() * 16).astype(numpy.float64).tobytes()] == label


def test_parts_are_disjoint():
    data = ready()
    parts = [as_rows(stack(part)) for part in (data.train_set, data.val_set, data.test_set)]
    assert [len(part) for part in parts] == [1295, 143, 359]
    assert len(set.union(*parts)) == 1797


def test_seed_moves_the_validation_images_but_never_the_test_images():
    one, other = ready(seed=0), ready(seed=1)
    assert torch.equal(stack(one.test_set), stack(other.test_set))
    assert as_rows(stack(one.val_set)) != as_rows(stack(other.val_set))


def test_augmentation_moves_training_images_by_one_pixel_at_most():
    plain, moved = ready(), ready(augment=True)
    assert torch.equal(stack(plain.val_set), stack(moved.val_set))
    assert torch.equal(stack(plain.test_set), stack(moved.test_set))
    original = plain.train_set[0][0]
    padded = torch.nn.functional.pad(original, (1, 1, 1, 1))
    shifts = {tuple(padded[:, y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    drawn = as_rows([moved.train_set[0][0] for _ in range(100)])
    assert drawn <= shifts
    assert len(drawn) > 3


def test_missing_scikit_learn_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'install it with pip install "lightning-prune\[quickstart\]"'):
        DigitsDataModule().setup("fit")
