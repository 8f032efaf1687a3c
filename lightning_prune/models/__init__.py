"""Networks, and the LightningModule that trains them."""

from lightning_prune.models.cifar_resnet import CifarResNet
from lightning_prune.models.classifier import ImageClassifier
from lightning_prune.models.distillation import Distillation
from lightning_prune.models.mobilenet import CifarMobileNetV2, MobileNetV1
from lightning_prune.models.optimization import Optimization
from lightning_prune.models.registry import build_network
from lightning_prune.models.regularization import Regularization
from lightning_prune.models.small import AlexNet, Conv4, DigitsNet, LeNet
from lightning_prune.models.small_image_resnet import SmallImageResNet
from lightning_prune.models.transfer import Transfer
from lightning_prune.models.vgg import CifarVGG
from lightning_prune.models.vit import SmallImageViT
from lightning_prune.models.weights import load_weights

__all__ = [
    "AlexNet",
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarVGG",
    "Conv4",
    "DigitsNet",
    "Distillation",
    "ImageClassifier",
    "LeNet",
    "MobileNetV1",
    "Optimization",
    "Regularization",
    "SmallImageResNet",
    "SmallImageViT",
    "Transfer",
    "build_network",
    "load_weights",
]
