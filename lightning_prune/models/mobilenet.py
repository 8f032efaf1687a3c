"""MobileNet V1 for images of any size, and MobileNet V2 for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from lightning_prune.models.initialization import initialize_he

# Channels and stride of each depthwise separable block: table 1 of Howard et al. 2017.
V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1),
    (1024, 2), (1024, 1),
)  # fmt: skip
# Expansion, channels, blocks and stride of each stage: table 2 of Sandler et al. 2018, the second stage with stride 1.
V2_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
)  # fmt: skip
SMALL_IMAGE = 64


class MobileNetV1(nn.Module):
    """Classify images with depthwise separable convolutions (Howard et al. 2017, "MobileNets").

    Images of fewer than 64 pixels keep their size in the first convolution and in the first block that would halve
    them, so that 32x32 ends as 4x4 rather than 1x1; widths and number of parameters do not depend on it.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        width: What the paper's numbers of channels are multiplied with, above 0.

    Raises:
        ValueError: If ``width`` gives a layer no channels.

    Example:
        >>> import torch
        >>> from lightning_prune.models import MobileNetV1
        >>> MobileNetV1(image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        channels = int(32 * width)
        if channels < 1:
            raise ValueError(f"width={width} gives the first layer no channels: set it to 1/32 or more.")
        super().__init__()
        is_small = image_size < SMALL_IMAGE
        stem = _conv_norm_relu(in_channels, channels, stride=1 if is_small else 2)
        self.features = nn.Sequential(stem)
        for number, (paper_channels, stride) in enumerate(V1_BLOCKS):
            if is_small and number == 1:
                stride = 1
            out_channels = int(paper_channels * width)
            block = _separable(channels, out_channels, stride)
            self.features.append(block)
            channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.features(x)
        x = self.pool(x)
        return self.classifier(torch.flatten(x, 1))


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class CifarMobileNetV2(MobileNetV2):
    """Classify 32x32 images with MobileNetV2 (Sandler et al. 2018), torchvision's without two of its strides.

    The first convolution and the second stage keep the size of the image, so that 32x32 ends as 4x4 rather than 1x1;
    widths and number of parameters are those of the ImageNet network.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        dropout: Probability in [0, 1] with which the classifier drops an input while training.
        width: Scales the number of channels of all layers, which stay multiples of 8, but for that of the last one,
            which never falls below 1280.

    Example:
        >>> import torch
        >>> from lightning_prune.models import CifarMobileNetV2
        >>> CifarMobileNetV2().eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.2, width: float = 1.0) -> None:
        stages = [list(stage) for stage in V2_STAGES]
        super().__init__(num_classes, width_mult=width, inverted_residual_setting=stages, dropout=dropout)
        channels = self.features[0][0].out_channels
        first = nn.Conv2d(in_channels, channels, 3, stride=1, padding=1, bias=False)
        initialize_he(first)
        self.features[0][0] = first
