import pytest
import torch
from torch import nn

from lightning_prune.models import CifarResNet, CifarVGG, build_network
from lightning_prune.models.registry import NETWORKS, build_network_for


class TinyNetwork(nn.Module):
    def __init__(self, num_classes, image_size=4, width=2):
        super().__init__()
        self.linear = nn.Linear(image_size**2, num_classes)
        self.width = width

    def forward(self, x):
        return self.linear(x.flatten(1))


def make_tiny_network(num_classes: int = 3) -> nn.Module:
    return TinyNetwork(num_classes)


def make_something(num_classes=3):
    return TinyNetwork(num_classes)


SMALLEST_SIZE = {"digits": 8, "lenet": 28}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_builds_a_network_that_fits_the_data(name):
    size = SMALLEST_SIZE.get(name, 32)
    network = build_network_for(name, 7, (2, size, size), {}).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 2, size, size)).shape == (2, 7)


def test_names_carry_their_depth():
    assert len(build_network("resnet56").layer1) == 9
    assert isinstance(build_network("resnet110"), CifarResNet)
    assert isinstance(build_network("vgg19_bn"), CifarVGG)
    assert sum(isinstance(module, nn.Conv2d) for module in build_network("vgg19_bn").modules()) == 16


def test_torchvision_network_gets_number_of_classes_and_arguments():
    network = build_network_for("torchvision/mobilenet_v3_small", 5, (3, 64, 64), {"dropout": 0.7})
    assert network.classifier[-1].out_features == 5
    assert network.classifier[-2].p == 0.7


def test_vision_transformers_of_torchvision_fit_the_size_of_the_images():
    with torch.device("meta"):
        network = build_network_for("torchvision/vit_b_16", 5, (3, 64, 64), {})
        swin = build_network_for("torchvision/swin_t", 5, (3, 64, 64), {})
    assert swin.head.out_features == 5
    assert network.encoder.pos_embedding.shape[1] == 1 + (64 // 16) ** 2
    assert network.heads.head.out_features == 5
    assert network(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 5)


def test_dotted_path_builds_a_class_and_an_annotated_function():
    assert build_network(f"{__name__}.TinyNetwork", num_classes=4).linear.out_features == 4
    assert build_network(f"{__name__}.make_tiny_network", num_classes=4).linear.out_features == 4
    assert type(build_network("torchvision.models.resnet18", num_classes=2)).__name__ == "ResNet"


def test_fitting_passes_what_the_network_takes_and_lets_network_args_win():
    network = build_network_for(f"{__name__}.TinyNetwork", 4, (3, 6, 6), {"width": 9})
    assert (network.linear.in_features, network.linear.out_features, network.width) == (36, 4, 9)
    network = build_network_for(f"{__name__}.TinyNetwork", 4, (3, 6, 6), {"image_size": 5})
    assert network.linear.in_features == 25


def test_unknown_name_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"Unknown network 'resnet21': choose one of resnet20, .* 'torchvision/<name>'"
    ):
        build_network("resnet21")


def test_unknown_torchvision_name_suggests_similar_ones():
    with pytest.raises(ValueError, match=r"Unknown network 'torchvision/resnet19'.*resnet1[08]"):
        build_network("torchvision/resnet19")


@pytest.mark.parametrize("name", ["torchvision/fasterrcnn_resnet50_fpn", "torchvision/quantized_resnet18"])
def test_torchvision_networks_of_other_tasks_are_refused(name):
    with pytest.raises(ValueError, match="no classification network of this name"):
        build_network(name)


@pytest.mark.parametrize("name", ["no_such_package.Net", "torch.nn.NoSuchLayer", ".Net", "..Net"])
def test_dotted_path_that_leads_nowhere_is_refused(name):
    with pytest.raises(ValueError, match=f"Cannot import network '{name}' .*check the path"):
        build_network(name)


# A name may come from a stranger's checkpoint: it must not be able to call just anything.
@pytest.mark.parametrize("name", ["os.system", "torch.load", "collections.OrderedDict", f"{__name__}.make_something"])
def test_dotted_path_to_anything_but_a_network_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is no network: .*-> nn.Module"):
        build_network(name)


def test_arguments_that_the_network_does_not_take_are_named():
    with pytest.raises(
        ValueError, match=r"'lenet' cannot be built \(.*'depth'.*its arguments are: num_classes, in_cha"
    ):
        build_network("lenet", depth=3)
    with pytest.raises(ValueError, match=r"missing a required argument: 'num_classes'"):
        build_network(f"{__name__}.TinyNetwork")
