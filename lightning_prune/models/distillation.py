"""Learning from the unpruned network (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.soft_targets import SoftTargets


@dataclass(frozen=True)
class Distillation(SoftTargets):
    """Say how a network learns from a trained teacher of the same architecture, which is not pruned.

    The teacher is another network, from a file. Where the network before the first prune is to be the teacher, set
    ``distill`` of the pruning callback.

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

    without: ClassVar[str] = "set `distillation` to null for no teacher"

    weights: str


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
        with torch.no_grad():
            expected = self.network.to(images)(images)
        share = self.settings.share
        return (1 - share) * label_loss + share * self.settings.divergence(logits, expected)
