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


def images_of(data, loader):
    return torch.cat([data.on_after_batch_transfer(batch)[0] for batch in loader])


def as_rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_images_are_those_of_scikit_learn_scaled_to_one():
    data = ready()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    parts = [images_of(data, loader) for loader in loaders]
    images = torch.cat(parts)
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert as_rows(images) == as_rows(torch.tensor(load_digits().images / 16))
    assert [len(as_rows(part)) for part in parts] == [1295, 143, 359]
    assert len(as_rows(images)) == 1797


def test_labels_belong_to_their_images():
    digits = load_digits()
    labels = {image.tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    for pixels, found in ready().test_dataloader():
        for image, label in zip(pixels, found.tolist(), strict=True):
            assert labels[image[0].numpy().astype(numpy.float64).tobytes()] == label


def test_seed_moves_the_validation_images_but_never_the_test_images():
    one, other = ready(seed=0), ready(seed=1)
    assert torch.equal(images_of(one, one.test_dataloader()), images_of(other, other.test_dataloader()))
    assert as_rows(images_of(one, one.val_dataloader())) != as_rows(images_of(other, other.val_dataloader()))


def test_augmentation_moves_training_images_by_one_pixel_at_most():
    plain, moved = ready(batch_size=2000), ready(batch_size=2000, augment=True)
    assert torch.equal(images_of(plain, plain.val_dataloader()), images_of(moved, moved.val_dataloader()))
    originals = images_of(plain, plain.train_dataloader())
    shifted = torch.nn.functional.pad(originals, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    found = images_of(moved, moved.train_dataloader())
    fits = (shifted == found[:, :, None, None]).all(dim=(4, 5)).flatten(1)  # (n, 9)
    assert fits.any(dim=1).all()
    assert fits.any(dim=0).all()


def test_missing_scikit_learn_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'install it with pip install "lightning-prune\[quickstart\]"'):
        DigitsDataModule().setup("fit")
