"""The LightningModule that trains an image classifier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_prune.ddp import rewrap
from lightning_prune.models.distillation import Distillation, Teacher
from lightning_prune.models.optimization import Optimization
from lightning_prune.models.registry import TORCHVISION_PREFIX, build_network_for
from lightning_prune.models.regularization import Regularization
from lightning_prune.models.transfer import Transfer
from lightning_prune.models.weights import load_pretrained

Settings = TypeVar("Settings")

# What is needed to train but not to load a checkpoint, on a machine that may not have the files they name.
FILES = ("weights", "distillation")


class ImageClassifier(L.LightningModule):
    """Train an image classifier.

    Every argument is a plain value, or a group of plain values that may be given as a dictionary, so that the module
    can be written in YAML and a checkpoint loads with ``torch.load(..., weights_only=True)``. Logs the means over each
    epoch of ``train/loss``, ``train/accuracy`` (top-1), ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy``, and where there are more than five classes ``val/accuracy_top5`` and ``test/accuracy_top5``.

    Args:
        network: Name of the network, as for :func:`lightning_prune.models.build_network`.
        num_classes: Number of classes, at least 2.
        input_shape: Shape (c, h, w) of one image.
        network_args: Further arguments of the network; ``num_classes``, ``in_channels`` and ``image_size`` are passed
            on without being named here.
        weights: Published weights to start from: a file, as for :func:`lightning_prune.models.load_weights`, or for
            ``torchvision/<name>`` the name of one of torchvision's own, such as "IMAGENET1K_V1".
        optimization: Optimizer, weight decay and learning rate: see `Optimization`.
        regularization: Label smoothing, mixup and cutmix: see `Regularization`.
        transfer: Which of the weights are not used or not trained, for classes other than theirs: see `Transfer`.
        distillation: A teacher of the same architecture to learn from: see `Distillation`.
        per_class: Also log the accuracy of each class, as ``val/accuracy_class_<number>`` and for the test.
        channels_last: Keep images and weights in this memory format, which is fastest on GPUs with mixed precision.

    Raises:
        ValueError: If an argument is outside its range, or if the network or the weights do not fit.
        FileNotFoundError: If there is no file ``weights``.

    Example:
        >>> import torch
        >>> from lightning_prune.models import ImageClassifier, Optimization
        >>> module = ImageClassifier("digits", 10, (1, 8, 8), optimization=Optimization(lr=0.05))
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
        optimization: Optimization | dict[str, Any] = Optimization(),  # noqa: B008  (it cannot be changed)
        regularization: Regularization | dict[str, Any] = Regularization(),  # noqa: B008
        transfer: Transfer | dict[str, Any] | None = None,
        distillation: Distillation | dict[str, Any] | None = None,
        per_class: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        network_args = network_args or {}
        _check_data(num_classes, input_shape)
        _check_network_args(network, network_args)
        self.optimization = _settings(Optimization, optimization)
        self.regularization = _settings(Regularization, regularization)
        self.transfer = _settings(Transfer, {} if transfer is None else transfer)
        # A checkpoint has every weight, so it does not name the file that training once started from. Together with
        # loading right here, this gives the right weights at every moment:
        # - load_from_checkpoint builds the module with weights=None, on a machine that may not have the file;
        # - what looks at the network before or in a callback's `setup` (scores, a trace without any Trainer) sees the
        #   published weights, whereas the module's own `setup` and `configure_model` run after the callbacks' `setup`;
        # - when a run resumes, the full network gets the file, and Lightning restores the checkpoint last, in the
        #   pruned shape. A later hook would load into a shrunken network and fail.
        groups: dict[str, Any] = {
            "optimization": asdict(self.optimization),
            "regularization": asdict(self.regularization),
            "transfer": transfer and asdict(self.transfer),
        }
        self.save_hyperparameters(ignore=[*FILES, *groups])
        self.save_hyperparameters(groups)
        self.network_name = network
        self.num_classes = num_classes
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.example_input_array = torch.zeros(1, *input_shape)

        build = partial(build_network_for, network, num_classes, input_shape, network_args)
        self.network = build()
        if weights is not None:
            new_head = "" if transfer is None else self.transfer.head_of(self.network)
            load_pretrained(self.network, network, weights, new_head)
        self.transfer.freeze(self.network, epoch=0)
        self.network.to(memory_format=self.memory_format)
        self.teacher = None if distillation is None else _make_teacher(distillation, network, build)

        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_metrics = _make_metrics(num_classes, per_class).clone(prefix="val/")
        self.test_metrics = _make_metrics(num_classes, per_class).clone(prefix="test/")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        return self.network(images.contiguous(memory_format=self.memory_format))

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Train what is to be trained in the epoch that a run starts or resumes in."""
        # The few batches of fast_dev_run are to show that later epochs work too.
        is_dev_run = getattr(self.trainer, "fast_dev_run", False)
        epoch = sys.maxsize if is_dev_run else self.current_epoch
        if self.transfer.freeze(self.network, epoch):
            rewrap(self.trainer)

    @property
    def unfreezes(self) -> bool:
        """Whether what is frozen at the start is trained later on, so that pruning counts on it."""
        return self.transfer.unfreeze_epoch is not None

    def on_train_epoch_start(self) -> None:
        """Train what is to be trained from this epoch on."""
        self.on_train_start()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (n, c, h, w) and labels (n,), or their probabilities (n, classes)."""
        images, labels = self.regularization.mix(*batch, self.num_classes)
        logits = self(images)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"Network {self.network_name!r} returns {type(logits).__name__} while training instead of logits: "
                "switch its auxiliary heads off, with network_args={'aux_logits': False}."
            )
        loss = F.cross_entropy(logits, labels, label_smoothing=self.regularization.label_smoothing)
        if self.teacher is not None:
            loss = self.teacher.loss(images, logits, loss)
        classes = labels.argmax(dim=1) if labels.dim() == 2 else labels
        self.train_accuracy(logits, classes)
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=len(labels))
        log("train/loss", loss, sync_dist=True)
        log("train/accuracy", self.train_accuracy)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and a schedule that steps once per epoch.

        Raises:
            ValueError: If the schedule is "cosine" and the Trainer has no number of epochs.
        """
        optimizer = self.optimization.make_optimizer(self)
        schedule = self.optimization.make_schedule(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    # -- validation, test and prediction ---------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of validation images (n, c, h, w) and labels (n,)."""
        self._evaluate("val/loss", self.val_metrics, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracies(self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of test images (n, c, h, w) and labels (n,)."""
        self._evaluate("test/loss", self.test_metrics, batch)

    def on_test_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracies(self.test_metrics)

    def _evaluate(self, name: str, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(name, loss, batch_size=len(labels), sync_dist=True)

    def _log_accuracies(self, metrics: MetricCollection) -> None:
        # Computed here and not by Lightning, which knows no metrics of several values. They are the same on all ranks.
        values = metrics.compute()
        metrics.reset()
        self.log_dict(values, prog_bar=len(values) < 3, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class probabilities (n, num_classes) of images, or of the images in (images, labels)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)


def _settings(kind: type[Settings], given: Settings | Mapping[str, Any]) -> Settings:
    """Return a group of settings, made of a dictionary where a checkpoint or a person has given one."""
    if not isinstance(given, Mapping):
        return given
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be made of {dict(given)}: {error}.") from error


def _make_teacher(
    distillation: Distillation | Mapping[str, Any], network_name: str, build: Callable[[], nn.Module]
) -> Teacher:
    settings = _settings(Distillation, distillation)
    network = load_pretrained(build(), network_name, settings.weights)
    return Teacher(network, settings)


def _make_metrics(num_classes: int, per_class: bool) -> MetricCollection:
    # cross_entropy refuses labels out of range; to look for them here too would make a GPU wait at every batch.
    accuracy = partial(MulticlassAccuracy, num_classes, validate_args=False)
    metrics: dict[str, Any] = {"accuracy": accuracy(average="micro")}
    if num_classes > 5:
        metrics["accuracy_top5"] = accuracy(top_k=5, average="micro")
    if per_class:
        accuracy_of_each = accuracy(average=None)
        metrics["classes"] = ClasswiseWrapper(accuracy_of_each, prefix="accuracy_class_")
    # Metrics that agree on the first batch are no groups: top-1 and top-5 may both be perfect there.
    return MetricCollection(metrics, compute_groups=False)


def _check_data(num_classes: int, input_shape: Sequence[int]) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} is no choice: set the number of classes, 2 or more.")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape={tuple(input_shape)} is no image: give (channels, height, width), such as (3, 32, 32)."
        )


def _check_network_args(network: str, network_args: Mapping[str, Any]) -> None:
    if network.startswith(TORCHVISION_PREFIX) and "weights" in network_args:
        raise ValueError("network_args may not name weights, which a checkpoint has: set `weights` instead.")
