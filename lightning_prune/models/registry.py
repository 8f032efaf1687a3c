"""Networks by name: this package's own, torchvision's, and any class or function of the user."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from lightning_prune.importing import imported
from lightning_prune.models.cifar_resnet import DEPTHS, CifarResNet
from lightning_prune.models.mobilenet import CifarMobileNetV2, MobileNetV1
from lightning_prune.models.small import AlexNet, Conv4, DigitsNet, LeNet
from lightning_prune.models.small_image_resnet import BLOCKS, SmallImageResNet
from lightning_prune.models.vgg import STAGE_CONVOLUTIONS, CifarVGG
from lightning_prune.models.vit import SmallImageViT

NetworkFactory = Callable[..., nn.Module]

NETWORKS: dict[str, NetworkFactory] = {
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in DEPTHS},
    **{f"vgg{depth}_bn": partial(CifarVGG, depth=depth) for depth in STAGE_CONVOLUTIONS},
    **{f"resnet{depth}": partial(SmallImageResNet, depth=depth) for depth in BLOCKS},
    "lenet": LeNet,
    "conv4": Conv4,
    "alexnet": AlexNet,
    "digits": DigitsNet,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": CifarMobileNetV2,
    "vit": SmallImageViT,
}

TORCHVISION_PREFIX = "torchvision/"
_VISION_TRANSFORMERS = f"{TORCHVISION_PREFIX}vit_"  # refuse images of another size than they were made for


def build_network(name: str, **network_args: Any) -> nn.Module:
    """Build a network from its name.

    Args:
        name: One of ``NETWORKS`` ("resnet20", "vgg16_bn", "lenet", "conv4", "alexnet", "digits", "mobilenet_v1", ...);
            "torchvision/<name>" for a classification network of torchvision, at ImageNet size; or the dotted path of
            your own ``nn.Module`` class, or of a function annotated to return one, such as "mypackage.MyNet".
        **network_args: Arguments of the network, such as ``num_classes`` and ``in_channels``.

    Returns:
        The network, with freshly drawn weights.

    Raises:
        ValueError: If there is no such network, or if it does not take these arguments.

    Example:
        >>> from lightning_prune.models import build_network
        >>> type(build_network("resnet20", num_classes=100)).__name__
        'CifarResNet'
        >>> build_network("torchvision/resnet18", num_classes=7).fc.out_features
        7
        >>> type(build_network("torch.nn.Linear", in_features=2, out_features=1)).__name__
        'Linear'
    """
    factory = find_factory(name)
    try:
        inspect.signature(factory).bind(**network_args)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(factory).parameters)
        raise ValueError(f"Network {name!r} cannot be built ({error}); its arguments are: {accepted}.") from error
    return factory(**network_args)


def build_network_for(
    name: str, num_classes: int, input_shape: Sequence[int], network_args: dict[str, Any]
) -> nn.Module:
    """Build a network that fits the data.

    ``num_classes``, ``in_channels`` and ``image_size`` are passed on to a network that has arguments of these names
    (torchvision's networks take ``num_classes``, and its vision transformers ``image_size``); what ``network_args``
    says has precedence.

    Args:
        name: As for :func:`build_network`.
        num_classes: Number of classes.
        input_shape: Shape (c, h, w) of one image.
        network_args: Further arguments of the network.

    Returns:
        The network, with freshly drawn weights.

    Raises:
        ValueError: As for :func:`build_network`.

    Example:
        >>> from lightning_prune.models.registry import build_network_for
        >>> network = build_network_for("lenet", 10, (3, 32, 32), {})
        >>> network.conv1.in_channels, network.linear1.in_features
        (3, 576)
    """
    channels, height, _ = input_shape
    fitting = {"num_classes": num_classes, "in_channels": channels, "image_size": height}
    if name.startswith(TORCHVISION_PREFIX):
        accepted = {"num_classes"}  # hidden in torchvision's **kwargs
        if name.startswith(_VISION_TRANSFORMERS):
            accepted.add("image_size")
    else:
        accepted = set(inspect.signature(find_factory(name)).parameters)
    arguments = {argument: value for argument, value in fitting.items() if argument in accepted}
    return build_network(name, **{**arguments, **network_args})


def find_factory(name: str) -> NetworkFactory:
    """Return what builds the network of this name.

    Args:
        name: As for :func:`build_network`.

    Returns:
        A class or function that returns an ``nn.Module``.

    Raises:
        ValueError: If there is no such network.

    Example:
        >>> from lightning_prune.models.registry import find_factory
        >>> find_factory("lenet").__name__
        'LeNet'
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith(TORCHVISION_PREFIX):
        return _find_in_torchvision(name.removeprefix(TORCHVISION_PREFIX))
    if "." in name:
        return _find_dotted(name)
    raise ValueError(
        f"Unknown network {name!r}: choose one of {', '.join(NETWORKS)}, or 'torchvision/<name>', "
        "or the dotted path of your own class or function."
    )


def _find_in_torchvision(name: str) -> NetworkFactory:
    # Only the module itself: without it, the list also has detection, segmentation, video and quantized networks.
    known = torchvision_models.list_models(module=torchvision_models)
    if name in known:
        return torchvision_models.get_model_builder(name)
    similar = difflib.get_close_matches(name, known) or ["resnet18", "mobilenet_v2"]
    raise ValueError(
        f"Unknown network 'torchvision/{name}': torchvision has no classification network of this name (it has, "
        f"among others, {', '.join(similar)}; torchvision.models.list_models() shows all)."
    )


def _find_dotted(path: str) -> NetworkFactory:
    try:
        found = imported(path)
    except ImportError as error:
        raise ValueError(f"Cannot import network {path!r} ({error}): check the path and the PYTHONPATH.") from error
    # The name may come from the hyper-parameters of somebody's checkpoint, so that a path that could call anything
    # ("os.system") would undo the safety of loading with weights_only=True. Only what declares to make networks passes.
    if not _returns_module(found):
        raise ValueError(
            f"{path!r} is no network: it must be a subclass of torch.nn.Module, or a function annotated to return one "
            "(def make_network(...) -> nn.Module)."
        )
    return found


def _returns_module(candidate: Any) -> bool:
    if inspect.isfunction(candidate):
        try:
            candidate = typing.get_type_hints(candidate).get("return")
        except NameError:  # an annotation that only a type checker can resolve
            return False
    return inspect.isclass(candidate) and issubclass(candidate, nn.Module)
