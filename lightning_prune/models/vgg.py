"""VGG networks with BatchNorm for 32x32 images (Simonyan and Zisserman 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.models.initialization import initialize_he

STAGE_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions per stage; each stage ends with a pooling layer. Table 1 of the paper, columns A, B, D and E.
STAGE_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVGG(nn.Module):
    """Classify 32x32 images with 3x3 convolutions, one after the other, and one linear layer.

    The three linear layers of the ImageNet network are replaced by one, as is usual for CIFAR-10: nearly all of the
    parameters are then in convolutions, where channels can be pruned.

    Args:
        depth: 11, 13, 16 or 19, counted as in the paper, that is with three linear layers.
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images; the images must be at least 32x32, because five stages halve them.
        width: Factor on the channels of all stages, above 0; a quarter trains in minutes on a CPU.

    Raises:
        ValueError: If ``depth`` is none of the above, or ``width`` gives a stage no channels.

    Example:
        >>> import torch
        >>> from lightning_prune.models import CifarVGG
        >>> CifarVGG(depth=11)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 16, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        if depth not in STAGE_CONVOLUTIONS:
            choices = ", ".join(map(str, STAGE_CONVOLUTIONS))
            raise ValueError(f"depth={depth} is not a VGG: choose one of {choices}.")
        widths = [int(channels * width) for channels in STAGE_WIDTHS]
        if min(widths) < 1:
            raise ValueError(f"width={width} gives stages no channels: set a factor of at least 1/64.")
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for convolutions, stage_width in zip(STAGE_CONVOLUTIONS[depth], widths, strict=True):
            for _ in range(convolutions):
                # No bias: the BatchNorm that follows would subtract it again.
                convolution = nn.Conv2d(channels, stage_width, 3, padding=1, bias=False)
                self.features.append(convolution)
                self.features.append(nn.BatchNorm2d(stage_width))
                self.features.append(nn.ReLU(inplace=True))
                channels = stage_width
            self.features.append(nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w), h and w at least 32, to logits (n, num_classes)."""
        x = self.features(x)
        x = self.pool(x)
        return self.classifier(torch.flatten(x, 1))
