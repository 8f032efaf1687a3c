"""What is measured of a sub-network on a batch: loss and accuracy."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

__all__ = [
    "Evaluate",
    "as_numbers",
    "classification",
    "classification_loss",
    "examples_in",
    "labelled",
    "per_example",
]

Evaluate = Callable[[nn.Module, Any], tuple[Any, Any]]
"""Given a model and a batch, returns the mean loss and the mean accuracy (any score; higher is better)."""

_REMEDY = "pass `evaluate`, a function of the model and a batch that returns loss and accuracy"


def classification(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the accuracy of a classifier on a batch ``(inputs, labels)``.

    Args:
        model: Maps the inputs to logits (n, classes), or (n, classes, ...) for labels of each position.
        batch: Inputs (n, ...) and labels (n,) or (n, ...), whole numbers below the number of classes.

    Returns:
        Mean loss and accuracy over the examples.

    Raises:
        ValueError: If the batch or the outputs have another form.

    Example:
        >>> import torch
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        >>> classification(nn.Identity(), batch)
        (tensor(0.4100), tensor(0.5000))
    """
    inputs, labels = labelled(batch)
    losses, hits = per_example(model(inputs), labels)
    return losses.mean(), hits.mean()


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of a classifier on a batch; see `classification`.

    Args:
        model: Maps the inputs to logits.
        batch: Inputs and labels.

    Raises:
        ValueError: If the batch or the outputs have another form.
    """
    return classification(model, batch)[0]


def labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a batch.

    Raises:
        ValueError: If it is no pair of tensors, or the labels are no whole numbers.
    """
    pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[1].is_floating_point():
        raise ValueError(f"The batch is no pair of inputs and labels that are whole numbers; {_REMEDY}.")
    return batch[0], batch[1]


def per_example(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of each example.

    Args:
        logits: (n, classes, ...).
        labels: (n, ...).

    Raises:
        ValueError: If the shapes do not fit.
    """
    fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() >= 2
    if not fits or logits.shape[:1] + logits.shape[2:] != labels.shape:
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The model returns {what} for labels of shape {tuple(labels.shape)}, which are no logits of a "
            f"classifier; {_REMEDY}."
        )
    losses = F.cross_entropy(logits, labels.long(), reduction="none")
    hits = (logits.argmax(1) == labels).to(losses.dtype)
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses, hits.flatten(1).mean(
        1
    ) if hits.dim() > 1 else hits


def examples_in(batch: Any) -> int:
    """Return the number of examples in a batch: the length of its first tensor.

    Raises:
        ValueError: If it holds no tensor.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"A batch of type {type(batch).__name__} holds no tensor; batches must be made of tensors.")


def as_numbers(measured: Any) -> tuple[float, float]:
    """Return what an `Evaluate` has returned as two numbers.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        loss, accuracy = measured
        return float(loss), float(accuracy)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"`evaluate` must return two numbers, loss and accuracy; it has returned {type(measured).__name__}."
        ) from None
