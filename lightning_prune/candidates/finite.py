"""Measures that are no numbers: what they are due to is said, before anything is ranked by them."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.finite import REMEDY, cause_in

__all__ = ["refuse_not_finite"]


def refuse_not_finite(model: nn.Module, batches: Iterable[Any], loss: Tensor, accuracy: Tensor) -> None:
    """Raise a ValueError if accuracies are not finite, or losses for a reason that holds for accuracies as well.

    A network that computes NaN still has an accuracy: that of always naming the first class. A loss alone may
    overflow in a sub-network, whose accuracy is then what it is.

    Args:
        model: The model whose sub-networks were measured.
        batches: The batches they were measured on; looked at again if something is wrong.
        loss: (candidates,) losses.
        accuracy: (candidates,) accuracies.

    Raises:
        ValueError: As above; the message names the parameter or the batch.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> _ = model.weight.data.fill_(float("nan"))
        >>> refuse_not_finite(model, [], torch.tensor([torch.nan]), torch.tensor([0.1]))
        Traceback (most recent call last):
        ValueError: What was measured is no measure, as the parameter 'weight' holds NaN; lower the learning rate, ...
    """
    if bool(loss.isfinite().all()) and bool(accuracy.isfinite().all()):
        return
    cause = cause_in(model, batches)
    if cause:
        raise ValueError(f"What was measured is no measure, as {cause}; {REMEDY}.")
    wrong = [value for value in accuracy.tolist() if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"`evaluate` has returned an accuracy of {wrong[0]}, by which nothing can be ranked; let it return a "
            "number, such as the worst one where there is none."
        )
