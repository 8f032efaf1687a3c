"""What keeps a classifier from learning its training images by heart: smoothed labels and mixed images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.transforms import v2


@dataclass(frozen=True)
class Regularization:
    """Say how training images and labels are blurred; validation and test see them as they are.

    With both ``mixup`` and ``cutmix``, every batch gets one of them, drawn at random.

    Args:
        label_smoothing: Share of the label that is spread over all classes, in [0, 1).
        mixup: Parameter of the Beta distribution that the weights of mixed images are drawn from, at least 0; 0 for
            no mixing (Zhang et al., "mixup", 2018).
        cutmix: The same for the areas of pasted patches (Yun et al., "CutMix", 2019).

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> from lightning_prune.models import Regularization
        >>> images, labels = Regularization(mixup=0.2).mix(torch.zeros(4, 3, 8, 8), torch.arange(4), num_classes=10)
        >>> labels.shape
        torch.Size([4, 10])
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside [0, 1): set it to 0 for none.")
        for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if not value >= 0:
                raise ValueError(f"{name}={value} is negative: set it to 0 for none.")

    def mix(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix the images of a batch in pairs, and their labels.

        Args:
            images: Training images (n, c, h, w).
            labels: Their labels (n,).
            num_classes: Number of classes.

        Returns:
            Images (n, c, h, w) and the probabilities of their classes (n, num_classes), or both as they were where no
            mixing is asked for.
        """
        mixers: list[nn.Module] = []
        if self.mixup:
            mixers.append(v2.MixUp(alpha=self.mixup, num_classes=num_classes))
        if self.cutmix:
            mixers.append(v2.CutMix(alpha=self.cutmix, num_classes=num_classes))
        if not mixers:
            return images, labels
        mix_by_one = v2.RandomChoice(mixers)
        return mix_by_one(images, labels)
