"""The residual networks of ImageNet for 32x32 images, as used on CIFAR-100."""

from __future__ import annotations

from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from lightning_prune.models.initialization import initialize_he

BLOCKS: dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


class SmallImageResNet(ResNet):
    """Classify 32x32 images with ResNet-18, 34 or 50 (He et al. 2016), torchvision's with another first layer.

    A 3x3 convolution with stride 1 takes the place of the 7x7 one with stride 2, and there is no max pooling, so that
    32x32 ends as 4x4 rather than 1x1. This is usual for CIFAR; published checkpoints of such networks load with
    :func:`lightning_prune.models.load_weights`.

    Args:
        depth: Number of weighted layers: 18, 34 or 50.
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.

    Raises:
        ValueError: If ``depth`` is none of the above.

    Example:
        >>> import torch
        >>> from lightning_prune.models import SmallImageResNet
        >>> SmallImageResNet(18, num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(self, depth: int = 18, num_classes: int = 10, in_channels: int = 3) -> None:
        if depth not in BLOCKS:
            choices = ", ".join(map(str, BLOCKS))
            raise ValueError(f"depth={depth} is not one of these ResNets: choose {choices}.")
        block, blocks_per_stage = BLOCKS[depth]
        super().__init__(block, blocks_per_stage, num_classes=num_classes)
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        initialize_he(self.conv1)
        self.maxpool = nn.Identity()
