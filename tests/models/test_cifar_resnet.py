import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as images

from lightning_prune.models import CifarResNet, build_network, load_weights
from lightning_prune.models.cifar_resnet import BasicBlock, PadShortcut

SHARED_DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# Table 6 of He et al. 2016, in millions.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_number_of_parameters_is_that_of_the_paper(depth, millions):
    digits = len(str(millions).split(".")[1])
    assert round(count_parameters(CifarResNet(depth)) / 1e6, digits) == millions


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_weighted_layers(depth):
    # Shortcuts of option B do not count, those of option A have no weights.
    layers = [module for module in CifarResNet(depth).modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_option_b_adds_two_1x1_convolutions_with_batchnorm():
    # 16 * 32 + 2 * 32 where stage two begins, 32 * 64 + 2 * 64 where stage three begins.
    difference = count_parameters(CifarResNet(20, shortcut="B")) - count_parameters(CifarResNet(20, shortcut="A"))
    assert difference == 576 + 2176


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_stages_halve_the_image_and_double_the_width(shortcut):
    network = CifarResNet(20, num_classes=7, in_channels=1, shortcut=shortcut)
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_pad_shortcut_keeps_every_second_pixel_between_zero_channels():
    x = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    out = PadShortcut(2, 4)(x)
    assert out.shape == (1, 4, 2, 2)
    assert out[0, 0].abs().sum() == 0
    assert out[0, 3].abs().sum() == 0
    assert out[0, 1].tolist() == [[1, 3], [9, 11]]
    assert out[0, 2].tolist() == [[17, 19], [25, 27]]


def test_pad_shortcut_adds_the_same_zeros_to_a_narrower_input():
    shortcut = PadShortcut(16, 32)
    out = shortcut(torch.ones(1, 5, 4, 4))
    assert out.shape[1] == 8 + 5 + 8
    assert out[0, :, 0, 0].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_block_adds_the_shortcut_after_the_second_batchnorm():
    block = BasicBlock(4, 4, shortcut="A").eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x.clamp(min=0))


def test_block_has_a_relu_between_its_convolutions():
    block = BasicBlock(4, 4, shortcut="A").eval()
    nn.init.constant_(block.conv1.weight, -1.0)  # negative everywhere, so that the ReLU leaves nothing
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="depth=18 is not a CIFAR ResNet: choose one of 20, 32, 44, 56, 110"):
        CifarResNet(18)


def test_unknown_shortcut_is_refused():
    with pytest.raises(ValueError, match="shortcut='C' is unknown: choose 'A'"):
        CifarResNet(20, shortcut="C")


@pytest.fixture(scope="module")
def every_twentieth_test_image():
    """Return 500 images (500, 3, 32, 32) and labels, 50 per class, read from the archive in about 3 seconds."""
    archive = SHARED_DATA / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("the shared JPEG copy of CIFAR-10 is not here")
    pixels, names = [], []
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            path = Path(member.name)
            if path.parts[0] == "test" and member.isfile() and int(path.stem) % 20 == 0:
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                pixels.append(images.normalize(images.to_tensor(image), MEAN, STD))
                names.append(path.parts[1])
    classes = sorted(set(names))
    return torch.stack(pixels), torch.tensor([classes.index(name) for name in names])


# On all 10,000 images of this copy, the published weights reach 81.0 % and 83.2 %. The standard deviation of an
# accuracy of 0.82 over 500 images is 0.017, so that 0.05 is three of them; a wrong shortcut costs far more.
@pytest.mark.parametrize(
    ("name", "file", "accuracy"),
    [("resnet20", "resnet20-12fca82f.th", 0.810), ("resnet56", "resnet56-4bfd9763.th", 0.832)],
)
def test_published_weights_reach_their_accuracy(every_twentieth_test_image, name, file, accuracy):
    pixels, labels = every_twentieth_test_image
    assert len(labels) == 500
    network = load_weights(build_network(name), SHARED_DATA / "pretrained" / file).eval()
    with torch.no_grad():
        predicted = torch.cat([network(batch).argmax(dim=1) for batch in pixels.split(100)])
    assert (predicted == labels).float().mean().item() == pytest.approx(accuracy, abs=0.05)
