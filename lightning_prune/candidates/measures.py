"""Measures of a sub-network on a batch: loss and accuracy, by default those of a classifier.

Users may give an `Evaluate` of their own; what it returns is checked here, and nothing is run but the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.graph.nested import first_length

__all__ = [
    "Evaluate",
    "Measurement",
    "as_measurement",
    "classification",
    "classification_loss",
    "labelled",
    "per_sample",
    "samples_in",
]

Evaluate = Callable[[nn.Module, Any], tuple[Any, Any]]
"""Given a model and a batch, returns the mean loss and the mean accuracy (any number; higher is better)."""

_REMEDY = (
    "accuracy is that of a classifier; name another metric that validation_step logs with `monitor`, or pass "
    "`evaluate`, a function of the model and a batch that returns loss and accuracy"
)


class Measurement(NamedTuple):
    """Loss and accuracy of one candidate, means over the samples of one batch."""

    loss: float
    accuracy: float


def classification(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the accuracy of a classifier on a batch ``(inputs, labels)``.

    Args:
        model: Maps the inputs to logits (n, classes), or (n, classes, ...) for labels of each position.
        batch: Inputs (n, ...) and labels (n,) or (n, ...), integers below the number of classes.

    Returns:
        Mean loss and accuracy over the samples.

    Raises:
        ValueError: If the batch or the outputs have another form.

    Example:
        >>> import torch
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        >>> classification(nn.Identity(), batch)
        (tensor(0.4100), tensor(0.5000))
    """
    inputs, labels = labelled(batch)
    losses, hits = per_sample(model(inputs), labels)
    return losses.mean(), hits.mean()


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of a classifier on a batch; see `classification`.

    Args:
        model: Maps the inputs to logits.
        batch: Inputs and labels.

    Raises:
        ValueError: If the batch or the outputs have another form.
    """
    loss, _ = classification(model, batch)
    return loss


def labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a batch.

    Raises:
        ValueError: If it is no pair of tensors, or the labels are no integers.
    """
    if _is_pair_of_tensors(batch):
        inputs, labels = batch
        if not labels.is_floating_point():
            return inputs, labels
    raise ValueError(f"The batch is no pair of inputs and labels that are integers; {_REMEDY}.")


def _is_pair_of_tensors(batch: Any) -> bool:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        return False
    return all(isinstance(item, Tensor) for item in batch)


def per_sample(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of each sample.

    Args:
        logits: (n, classes, ...).
        labels: (n, ...).

    Returns:
        (n,) losses and (n,) accuracies, means over the positions of a sample.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_logits(logits, labels)
    try:
        losses = F.cross_entropy(logits, labels.long(), reduction="none")  # (n, ...)
    except IndexError:  # on a CPU
        raise ValueError(
            f"The labels go up to {int(labels.max())}, and the model returns {logits.shape[1]} logits; {_REMEDY}."
        ) from None
    hits = (logits.argmax(1) == labels).to(losses.dtype)  # (n, ...)
    return _mean_over_positions(losses), _mean_over_positions(hits)


def _check_logits(logits: Any, labels: Tensor) -> None:
    if not isinstance(logits, Tensor):
        description = type(logits).__name__
    else:
        shape_of_labels = logits.shape[:1] + logits.shape[2:]
        if logits.is_floating_point() and logits.dim() >= 2 and shape_of_labels == labels.shape:
            return
        description = f"a tensor of shape {tuple(logits.shape)}"
    raise ValueError(
        f"The model returns {description} for labels of shape {tuple(labels.shape)}, which are no logits of a "
        f"classifier; {_REMEDY}."
    )


def _mean_over_positions(values: Tensor) -> Tensor:
    """Return (n,) means of values (n, ...)."""
    if values.dim() == 1:
        return values
    return values.flatten(1).mean(1)


def samples_in(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor.

    Raises:
        ValueError: If there is no tensor in it.
    """
    found = first_length(batch)
    if found is None:
        raise ValueError(
            f"There is no tensor in a batch of type {type(batch).__name__}; batches must be made of tensors."
        )
    return found


def as_measurement(returned: Any) -> Measurement:
    """Return what an `Evaluate` has returned as two numbers.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        loss, accuracy = returned
        return Measurement(float(loss), float(accuracy))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"`evaluate` must return two numbers, loss and accuracy; it has returned {type(returned).__name__}."
        ) from None
