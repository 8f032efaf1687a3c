"""The LightningModule that trains an image classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.checkpoint import restore_shape
from lightning_prune.models.registry import build_network_for
from lightning_prune.models.weights import load_weights

SCHEDULES = ("cosine", "steps", "constant")


def learning_rate_factor(
    epoch: int, max_epochs: int, schedule: str, warmup_epochs: int = 0, milestones: Sequence[int] = ()
) -> float:
    """Return what the learning rate is multiplied with in an epoch.

    Args:
        epoch: The epoch, from 0.
        max_epochs: Number of epochs of the whole training; only "cosine" needs it.
        schedule: "cosine" falls to 0 along half a cosine, "steps" divides by 10 at each milestone, "constant" stays.
        warmup_epochs: Number of epochs at the start in which the factor rises in equal steps, the schedule following.
        milestones: Epochs of "steps".

    Returns:
        The factor, in [0, 1].

    Example:
        >>> from lightning_prune.models.classifier import learning_rate_factor
        >>> [learning_rate_factor(epoch, 4, "cosine") for epoch in (0, 2)]
        [1.0, 0.5]
        >>> [learning_rate_factor(epoch, 4, "constant", warmup_epochs=1) for epoch in (0, 1)]
        [0.5, 1.0]
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    if schedule == "cosine":
        progress = (epoch - warmup_epochs) / max(1, max_epochs - warmup_epochs)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "steps":
        return 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return 1.0


class ImageClassifier(L.LightningModule):
    """Train an image classifier with SGD.

    Every argument is a plain value, so that the module can be written in YAML and a checkpoint loads with
    ``torch.load(..., weights_only=True)``. Logs ``train/loss``, ``train/accuracy``, ``val/loss``, ``val/accuracy``,
    ``test/loss`` and ``test/accuracy`` (top-1), once per epoch.

    Args:
        network: Name of the network, as for :func:`lightning_prune.models.build_network`.
        num_classes: Number of classes, at least 2.
        input_shape: Shape (c, h, w) of one image.
        network_args: Further arguments of the network; ``num_classes``, ``in_channels`` and ``image_size`` are passed
            on without being named here.
        weights: File of published weights to start from, as for :func:`lightning_prune.models.load_weights`.
        lr: Learning rate of SGD, above 0.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, at least 0.
        nesterov: Use Nesterov's momentum.
        schedule: How the learning rate falls from epoch to epoch: "cosine", "steps" or "constant".
        warmup_epochs: Number of epochs in which the learning rate rises before the schedule begins, at least 0.
        milestones: Rising epochs at which the schedule "steps" divides the learning rate by 10.
        label_smoothing: Share of the label that is spread over all classes while training, in [0, 1).

    Raises:
        ValueError: If an argument is outside its range, or if the network or the weights do not fit.
        FileNotFoundError: If there is no file ``weights``.

    Example:
        >>> import torch
        >>> from lightning_prune.models import ImageClassifier
        >>> module = ImageClassifier(network="digits", num_classes=10, input_shape=(1, 8, 8))
        >>> module(module.example_input_array).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        network: str = "resnet20",
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        network_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        schedule: str = "cosine",
        warmup_epochs: int = 0,
        milestones: list[int] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # A checkpoint holds every weight, so it does not name the file that training once started from. Together with
        # loading right here, this gives the right weights at every moment:
        # - load_from_checkpoint builds the module with weights=None, on a machine that may not have the file;
        # - what looks at the network before or in a callback's `setup` (scores, a trace without any Trainer) sees the
        #   published weights, whereas the module's own `setup` and `configure_model` run after the callbacks' `setup`;
        # - when a run resumes, the full network gets the file, the pruner then shrinks it in its `setup`, and Lightning
        #   restores the checkpoint last, so that it wins. A later hook would load into a shrunken network and fail.
        self.save_hyperparameters(ignore=["weights"])
        milestones = milestones or []
        _check_data(num_classes, input_shape)
        _check_optimizer(lr, momentum, weight_decay, nesterov)
        _check_schedule(schedule, warmup_epochs, milestones, label_smoothing)
        self.network_name = network
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.milestones = milestones
        self.label_smoothing = label_smoothing
        self.example_input_array = torch.zeros(1, *input_shape)
        self.network = build_network_for(network, num_classes, input_shape, network_args or {})
        if weights is not None:
            load_weights(self.network, weights)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        return self.network(images)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the shape of a pruned checkpoint, so that ``load_from_checkpoint`` works with it."""
        restore_shape(self, checkpoint)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (n, c, h, w) and labels (n,)."""
        images, labels = batch
        logits = self(images)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"Network {self.network_name!r} returns {type(logits).__name__} while training instead of logits: "
                "switch its auxiliary heads off, with network_args={'aux_logits': False}."
            )
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch of validation images (n, c, h, w) and labels (n,)."""
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch of test images (n, c, h, w) and labels (n,)."""
        self._evaluate("test", self.test_accuracy, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities (n, num_classes) of images, or of the images in (images, labels)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD, and a schedule that steps once per epoch.

        Raises:
            ValueError: If the schedule is "cosine" and the Trainer has no number of epochs.
        """
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        max_epochs = self.trainer.max_epochs
        if self.schedule == "cosine" and (max_epochs is None or max_epochs < 1):
            raise ValueError("schedule='cosine' must know where it ends: set Trainer(max_epochs=...).")

        def factor(epoch: int) -> float:
            return learning_rate_factor(epoch, max_epochs or 0, self.schedule, self.warmup_epochs, self.milestones)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "epoch"}}


def _check_data(num_classes: int, input_shape: Sequence[int]) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} leaves nothing to classify: set the number of classes, 2 or more.")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape={tuple(input_shape)} is no image: give (channels, height, width), such as (3, 32, 32)."
        )


def _check_optimizer(lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
    if not lr > 0:
        raise ValueError(f"lr={lr} would not train: set a learning rate above 0.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} is outside [0, 1): set it to 0.9, or to 0 for none.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} is negative: set it to 0 or above.")
    if nesterov and momentum == 0:
        raise ValueError("nesterov=True needs momentum: set momentum above 0, or nesterov to False.")


def _check_schedule(schedule: str, warmup_epochs: int, milestones: Sequence[int], label_smoothing: float) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs={warmup_epochs} is negative: set it to 0 for none.")
    if schedule == "steps" and not milestones:
        raise ValueError("schedule='steps' needs milestones: list the epochs at which the learning rate falls.")
    if any(late <= early for early, late in zip([0, *milestones], milestones, strict=False)):
        raise ValueError(f"milestones={list(milestones)} do not rise: list epochs above 0, each later than the last.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1): set it to 0 for none.")
