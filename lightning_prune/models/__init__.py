"""Networks, and the LightningModule that trains them."""

from lightning_prune.models.cifar_resnet import CifarResNet
from lightning_prune.models.classifier import ImageClassifier
from lightning_prune.models.registry import build_network
from lightning_prune.models.small import AlexNet, CifarMobileNetV2, DigitsNet, LeNet
from lightning_prune.models.vgg import CifarVGG
from lightning_prune.models.weights import load_weights

__all__ = [
    "AlexNet",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarVGG",
    "DigitsNet",
    "ImageClassifier",
    "LeNet",
    "build_network",
    "load_weights",
]
