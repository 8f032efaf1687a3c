"""Learning from the unpruned network (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Distillation:
    """Say how a network learns from a trained teacher of the same architecture, which is not pruned.

    Args:
        weights: The teacher's weights: a file, such as a checkpoint of a run without pruning, or a name, as for the
            ``weights`` of `ImageClassifier`.
        temperature: What both networks' logits are divided by before they are compared, above 0.
        share: Share of the teacher in the loss, in (0, 1]; the rest is that of the labels.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> from lightning_prune.models import Distillation
        >>> Distillation("resnet56.ckpt", temperature=2.0).share
        0.9
    """

    weights: str
    temperature: float = 4.0
    share: float = 0.9

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: 4 is usual.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is outside (0, 1]: set `distillation` to null for no teacher.")


class Teacher:
    """Compare a student with a trained network that never changes.

    This is not an ``nn.Module``, so that a module that has one has neither the teacher's weights in its
    checkpoints nor its channels among those to be pruned.

    Args:
        network: The trained network; it is frozen, and follows the images to their device and type.
        settings: Temperature and share.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune.models.distillation import Distillation, Teacher
        >>> network = nn.Linear(4, 3)
        >>> teacher, images = Teacher(network, Distillation("", share=1.0)), torch.rand(2, 4)
        >>> float(teacher.loss(images, network(images), torch.tensor(5.0)))
        0.0
    """

    def __init__(self, network: nn.Module, settings: Distillation) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings = settings

    def loss(self, images: Tensor, logits: Tensor, label_loss: Tensor) -> Tensor:
        """Return the loss with the teacher's share in it.

        Args:
            images: The images (n, c, h, w) that the student has seen.
            logits: What it said of them (n, classes).
            label_loss: The loss of the labels, a single number.
        """
        temperature, share = self.settings.temperature, self.settings.share
        with torch.no_grad():
            expected_logits = self.network.to(images)(images)
        expected = F.log_softmax(expected_logits / temperature, dim=1)  # (n, classes)
        said = F.log_softmax(logits / temperature, dim=1)  # (n, classes)
        divergence = F.kl_div(said, expected, reduction="batchmean", log_target=True)
        # The gradients of soft targets fall with the square of the temperature (section 2 of the paper).
        return (1 - share) * label_loss + share * temperature**2 * divergence
