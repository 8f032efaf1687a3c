import pytest
import torch

from lightning_prune.models import Regularization


def batch():
    """Return four images, each of one colour that is its label, and the labels."""
    labels = torch.arange(4)
    return labels.float().view(4, 1, 1, 1).expand(4, 1, 8, 8).clone(), labels


def test_nothing_asked_for_leaves_the_batch_alone():
    images, labels = batch()
    mixed = Regularization(label_smoothing=0.1).mix(images, labels, 5)
    assert mixed[0] is images
    assert mixed[1] is labels


@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_labels_are_mixed_in_the_proportion_of_the_images(settings):
    images, labels = Regularization(**settings).mix(*batch(), 5)
    assert labels.shape == (4, 5)
    assert torch.allclose(labels.sum(dim=1), torch.ones(4))
    # The colour of an image is its label, so that the mean colour is the mean label.
    assert torch.allclose(images.mean(dim=(1, 2, 3)), labels @ torch.arange(5.0), atol=1e-6)
    uniform = [len(image.unique()) == 1 for image in images]
    assert all(uniform) if "mixup" in settings else not any(uniform)


def test_both_take_turns():
    seen = set()
    for _ in range(30):
        images, _ = Regularization(mixup=1.0, cutmix=1.0).mix(*batch(), 5)
        seen.add(all(len(image.unique()) == 1 for image in images))
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is outside \[0, 1\): set it to 0"),
        ({"mixup": -0.1}, "mixup=-0.1 is negative: set it to 0 for none"),
        ({"cutmix": float("nan")}, "cutmix=nan is negative"),
    ],
)
def test_bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Regularization(**settings)
