import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from lightning_prune.models import (
    AlexNet,
    CifarMobileNetV2,
    CifarVGG,
    Conv4,
    DigitsNet,
    LeNet,
    MobileNetV1,
    SmallImageResNet,
    SmallImageViT,
)
from lightning_prune.models.initialization import initialize_he


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_the_convolutions_of_its_depth(depth):
    network = CifarVGG(depth)
    # The name counts three linear layers, of which one is left.
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == depth - 3
    assert sum(isinstance(module, nn.MaxPool2d) for module in network.modules()) == 5
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 1


def test_vgg16_has_the_known_number_of_parameters():
    # 14.7 M: convolutions without biases, two numbers per channel of BatchNorm, a classifier of 512 x 10 + 10.
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(9 * widths[i] * widths[i + 1] for i in range(13))
    expected = convolutions + 2 * sum(widths[1:]) + 5130
    assert count_parameters(CifarVGG(16)) == expected == 14_724_042


def test_vgg_takes_larger_images_other_channels_and_classes():
    network = CifarVGG(11, num_classes=7, in_channels=1).eval()
    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 7)


def test_unknown_vgg_is_refused():
    with pytest.raises(ValueError, match="depth=15 is not a VGG: choose one of 11, 13, 16, 19"):
        CifarVGG(15)


def test_lenet_has_the_61706_parameters_of_lenet_5():
    assert count_parameters(LeNet()) == 61_706


@pytest.mark.parametrize("image_size", [12, 13, 28, 32, 33])
def test_lenet_and_alexnet_fit_their_image_size(image_size):
    for network in (LeNet(image_size=image_size), AlexNet(in_channels=1, image_size=image_size)):
        assert network.eval()(torch.zeros(2, 1, image_size, image_size)).shape == (2, 10)


def test_alexnet_has_five_convolutions_three_linear_layers_and_dropout():
    kinds = [type(module) for module in AlexNet().modules()]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.Linear, nn.Dropout)] == [5, 3, 2]


def test_conv4_has_the_layers_of_the_lottery_ticket_paper():
    # 3x3 convolutions of 1-64-64-128-128 with biases, then 7 * 7 * 128 - 256 - 256 - 10.
    convolutions = (9 * 1 + 1) * 64 + (9 * 64 + 1) * 64 + (9 * 64 + 1) * 128 + (9 * 128 + 1) * 128
    linear = (6272 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 10
    assert count_parameters(Conv4()) == convolutions + linear
    assert Conv4(num_classes=7, in_channels=3, image_size=33)(torch.zeros(2, 3, 33, 33)).shape == (2, 7)


@pytest.mark.parametrize(("network", "smallest"), [(LeNet, 12), (AlexNet, 8), (Conv4, 4)])
def test_images_that_would_vanish_are_refused(network, smallest):
    with pytest.raises(ValueError, match=f"image_size={smallest - 1} is too small for \\w+: use images of at least"):
        network(image_size=smallest - 1)
    network(image_size=smallest)


def test_digits_network_has_seven_convolutions_in_three_widths():
    widths = [module.out_channels for module in DigitsNet().modules() if isinstance(module, nn.Conv2d)]
    assert widths == [32, 32, 32, 64, 64, 64, 128]
    assert DigitsNet(width=8)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_digits_network_adds_its_residual_blocks_to_what_comes_in():
    network = DigitsNet().eval()
    block = network.stage1[1]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_mobilenet_has_the_parameters_of_the_paper_and_ends_at_4x4():
    network = CifarMobileNetV2().eval()
    # 3,504,872 of the ImageNet network, whose classifier is 1280 x 1000 + 1000 and not 1280 x 10 + 10.
    assert count_parameters(network) == 3_504_872 - 1_281_000 + 12_810
    assert network.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)
    assert CifarMobileNetV2(num_classes=7, in_channels=1).eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_mobilenet_v1_has_the_size_of_the_paper():
    # Table 4 of Howard et al.: 4.2 million parameters and 569 million multiply-adds for 224x224 images.
    network = MobileNetV1(num_classes=1000, image_size=224).eval()
    assert count_parameters(network) == 4_231_976
    flops = FlopCountAnalysis(network, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False).by_operator()
    assert round((flops["conv"] + flops["linear"]) / 1e6) == 569
    assert network.features(torch.zeros(1, 3, 224, 224)).shape == (1, 1024, 7, 7)


def test_mobilenet_v1_ends_at_4x4_for_small_images_and_scales():
    assert MobileNetV1(image_size=32).eval().features(torch.zeros(1, 3, 32, 32)).shape == (1, 1024, 4, 4)
    assert MobileNetV1(width=0.25, in_channels=1).eval().features(torch.zeros(1, 1, 32, 32)).shape == (1, 256, 4, 4)
    with pytest.raises(ValueError, match=r"width=0.01 gives the first layer no channels: set it to 1/32 or more"):
        MobileNetV1(width=0.01)


def test_the_vision_transformer_has_the_parameters_worked_out_by_hand():
    # A stem of 3 - 48 - 96 with five passes, 64 positions, six blocks, a norm and a head.
    stem = 9 * 3 * 48 + 2 * 48 + 9 * 48 * 96 + 96
    block = 2 * 96 + 4 * 96 * 96 + 3 * 96 + 2 * 96 + 96 * 192 + 192 + 192 * 96 + 96  # keys have no bias
    network = SmallImageViT()
    assert count_parameters(network) == stem + 64 * 96 + 6 * block + 2 * 96 + 970
    assert SmallImageViT(7, 1, 8, depth=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


def test_what_is_left_of_attention_with_narrower_queries_and_keys_is_scaled_as_before():
    attention = SmallImageViT(width=8, depth=1, num_heads=2).blocks[0].attention
    x = torch.randn(2, 5, 8)
    for layer in (attention.query, attention.key):
        layer.weight.data[3::4] = 0  # the last channel of both heads
    attention.query.bias.data.zero_()
    expected = attention(x)
    for layer in (attention.query, attention.key):
        layer.weight.data = layer.weight.data[[0, 1, 2, 4, 5, 6]]
    attention.query.bias.data = torch.zeros(6)
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "image_size=30 cannot be cut into tokens: use a multiple of 4"),
        ({"image_size": 0}, "image_size=0 cannot be cut into tokens"),
        ({"width": 90}, "width=90 cannot be shared by 4 heads: use a multiple of num_heads"),
        ({"num_heads": 0}, "cannot be shared by 0 heads"),
        ({"depth": 0}, "depth=0 leaves no block: use 1 or more"),
    ],
)
def test_a_vision_transformer_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SmallImageViT(**settings)


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.22), (34, 21.33), (50, 23.71)])
def test_small_image_resnets_have_the_known_sizes(depth, millions):
    # As reported for CIFAR-100 wherever such networks are trained, in millions.
    network = SmallImageResNet(depth, num_classes=100).eval()
    assert round(count_parameters(network) / 1e6, 2) == millions
    seen = []
    network.layer4.register_forward_hook(lambda layer, args, output: seen.append(tuple(output.shape[2:])))
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert seen == [(4, 4)]


def test_small_image_resnet_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="depth=19 is not one of these ResNets: choose 18, 34, 50"):
        SmallImageResNet(19)


def test_initialization_has_the_spread_of_he_and_no_bias():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Linear(400, 100), nn.BatchNorm2d(4))
    initialize_he(network)
    # sqrt(2 / (128 * 9)) for the convolution, sqrt(1 / 400) for the linear layer
    assert network[0].weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    assert network[1].weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert network[0].bias.abs().sum() == network[1].bias.abs().sum() == 0
    assert network[2].weight.tolist() == [1, 1, 1, 1]
