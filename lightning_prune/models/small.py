"""Small networks: LeNet, Conv-4, an AlexNet for small images, and a network for 8x8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.models.initialization import initialize_he


def _check_image_size(network: str, image_size: int, smallest: int) -> None:
    if image_size < smallest:
        raise ValueError(f"image_size={image_size} is too small for {network}: use images of at least {smallest}.")


class LeNet(nn.Module):
    """Classify digits with two convolutions and three linear layers (LeNet-5, LeCun et al. 1998, with ReLU).

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels, at least 12; MNIST has 28.

    Raises:
        ValueError: If ``image_size`` is too small.

    Example:
        >>> import torch
        >>> from lightning_prune.models import LeNet
        >>> LeNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        _check_image_size("LeNet", image_size, smallest=12)
        super().__init__()
        # 28 -> (conv 5, padding 2) 28 -> (pool) 14 -> (conv 5) 10 -> (pool) 5
        final_size = (image_size // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * final_size**2, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, num_classes)
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.linear1(x))
        x = F.relu(self.linear2(x))
        return self.linear3(x)


class Conv4(nn.Module):
    """Classify small images with four convolutions and three linear layers (Conv-4).

    The paper on sensitiveness-based pruning uses a Conv-4 on MNIST; what was at hand of it does not say how that is
    built. This one is the Conv-4 of Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), figure 2: 64, 64,
    pooling, 128, 128, pooling, then linear layers of 256, 256 and the classes.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels, at least 4; MNIST has 28.

    Raises:
        ValueError: If ``image_size`` is too small.

    Example:
        >>> import torch
        >>> from lightning_prune.models import Conv4
        >>> Conv4()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        _check_image_size("Conv4", image_size, smallest=4)
        super().__init__()
        final_size = image_size // 4  # two pooling layers
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(128 * final_size**2, 256), nn.ReLU(inplace=True),
            nn.Linear(256, 256), nn.ReLU(inplace=True),
            nn.Linear(256, num_classes),
        )  # fmt: skip
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        x = self.features(x)
        return self.classifier(torch.flatten(x, 1))


class AlexNet(nn.Module):
    """Classify 28x28 or 32x32 images with five convolutions and three linear layers (after Krizhevsky et al. 2012).

    The widths of the convolutions are those of torchvision's AlexNet; filters are 3x3 and the stride is 1, because the
    11x11 filters with stride 4 of the original would make nothing of a small image. There is no BatchNorm.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels, at least 8.
        hidden_features: Width of the two hidden linear layers.
        dropout: Probability in [0, 1] with which a hidden linear layer drops an input while training.

    Raises:
        ValueError: If ``image_size`` is too small.

    Example:
        >>> import torch
        >>> from lightning_prune.models import AlexNet
        >>> AlexNet(in_channels=1, image_size=28)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        hidden_features: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        _check_image_size("AlexNet", image_size, smallest=8)
        super().__init__()
        final_size = image_size // 8  # three pooling layers
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * final_size**2, hidden_features), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Linear(hidden_features, hidden_features), nn.ReLU(inplace=True),
            nn.Linear(hidden_features, num_classes),
        )  # fmt: skip
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        x = self.features(x)
        return self.classifier(torch.flatten(x, 1))


class _ResidualBlock(nn.Module):
    """Add two 3x3 convolutions to what comes in, at the same width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to the same shape."""
        out = self.bn1(self.conv1(x))
        out = F.relu(out)
        out = self.bn2(self.conv2(out))
        return F.relu(x + out)


def _widen(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DigitsNet(nn.Module):
    """Classify 8x8 digits with seven convolutions in three stages, two of them with a residual block.

    It is small enough to train in seconds on a CPU and wide enough to be worth pruning. Free layers (inside the blocks)
    and coupled ones (a stage's first convolution, whose channels the block adds to) both occur.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        width: Channels of the first stage; the second has twice, the third four times as many.

    Example:
        >>> import torch
        >>> from lightning_prune.models import DigitsNet
        >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        first, second, third = width, 2 * width, 4 * width
        self.stage1 = nn.Sequential(_widen(in_channels, first, stride=1), _ResidualBlock(first))
        self.stage2 = nn.Sequential(_widen(first, second, stride=2), _ResidualBlock(second))
        self.stage3 = _widen(second, third, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.pool(x)
        return self.linear(torch.flatten(x, 1))
