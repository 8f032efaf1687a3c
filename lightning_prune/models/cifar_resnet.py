"""Residual networks for 32x32 images (He et al. 2016, "Deep Residual Learning", section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.models.initialization import initialize_he

DEPTHS = (20, 32, 44, 56, 110)
STAGE_WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Halve the image and widen it with zero channels, without any parameter (option A of the paper).

    Args:
        in_channels: Channels that come in, at least 1.
        out_channels: Channels that go out, at least ``in_channels``; the zeros are shared evenly by both ends.

    Example:
        >>> import torch
        >>> from lightning_prune.models.cifar_resnet import PadShortcut
        >>> PadShortcut(16, 32)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # Both amounts are numbers fixed here and never worked out again from x.shape: zero channel k of the wide side
        # must remain zero channel k when channels of the narrow side are pruned. Pad amounts that followed the shape
        # of x would grow by what was pruned, and every kept channel would be added to a different partner than before.
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return every second pixel of ``x`` (n, c, h, w), with zero channels around: (n, c + zeros, h / 2, w / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to a shortcut.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out; more than ``in_channels`` where a stage begins.
        shortcut: "A" (zero padding) or "B" (1x1 convolution), used where a stage begins.

    Example:
        >>> import torch
        >>> from lightning_prune.models.cifar_resnet import BasicBlock
        >>> BasicBlock(16, 32, shortcut="A")(torch.ones(2, 16, 8, 8)).shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, shortcut: str) -> None:
        super().__init__()
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2 and shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels)
        elif stride == 2:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h, w), or to half of h and w where a stage begins."""
        out = self.bn1(self.conv1(x))
        out = F.relu(out)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Classify 32x32 images with three stages of 16, 32 and 64 channels.

    Module names are those of the published CIFAR-10 checkpoints, so these load with
    :func:`lightning_prune.models.load_weights`.

    Args:
        depth: Number of weighted layers: 20, 32, 44, 56 or 110.
        num_classes: Number of classes, at least 1.
        in_channels: Channels of the images.
        shortcut: Where a stage begins, "A" pads with zeros and "B" convolves with 1x1 filters.

    Raises:
        ValueError: If ``depth`` or ``shortcut`` is none of the above.

    Example:
        >>> import torch
        >>> from lightning_prune.models import CifarResNet
        >>> network = CifarResNet(depth=20)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in network.parameters())
        269722
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, shortcut: str = "A") -> None:
        if depth not in DEPTHS:
            choices = ", ".join(map(str, DEPTHS))
            raise ValueError(f"depth={depth} is not a CIFAR ResNet: choose one of {choices}.")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut={shortcut!r} is unknown: choose 'A' (zero padding) or 'B' (1x1 convolution).")
        super().__init__()
        blocks = (depth - 2) // 6
        first, second, third = STAGE_WIDTHS
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _make_stage(blocks, first, first, shortcut)
        self.layer2 = _make_stage(blocks, first, second, shortcut)
        self.layer3 = _make_stage(blocks, second, third, shortcut)
        self.linear = nn.Linear(third, num_classes)
        initialize_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to logits (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def _make_stage(blocks: int, in_channels: int, out_channels: int, shortcut: str) -> nn.Sequential:
    stage = nn.Sequential()
    for _ in range(blocks):
        block = BasicBlock(in_channels, out_channels, shortcut)
        stage.append(block)
        in_channels = out_channels
    return stage
