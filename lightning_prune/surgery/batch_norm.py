"""Statistics of batch normalisation that follow what is kept."""

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.graph.twin import set_mode, twin_in_evaluation
from lightning_prune.surgery.replacing import uninterrupted

__all__ = ["estimate_statistics", "recalibrate", "running_statistics"]

Run = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], run: Run = nn.Module.__call__) -> None:
    """Estimate the running statistics of batch normalisation anew, in place, as the mean over some batches.

    Masks and pruning change the statistics of the layers behind them; this corrects them without training. Nothing
    but the statistics changes, and these only in the end, all at once: a twin of the model runs.

    Args:
        model: The model.
        batches: The batches to take statistics from.
        run: Runs a model on a batch; default ``model(batch)``.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> norm = nn.BatchNorm1d(1).eval()
        >>> recalibrate(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean, norm.running_var, norm.training
        (tensor([4.]), tensor([2.]), False)
    """
    with twin_in_evaluation(model) as twin:
        estimate_statistics(twin.model, batches, run)
        with uninterrupted():
            for statistic in running_statistics(model):
                statistic.copy_(twin.of(statistic))


def estimate_statistics(model: nn.Module, batches: Iterable[Any], run: Run) -> None:
    """Do what `recalibrate` does with a twin, which is left in evaluation mode.

    Args:
        model: The twin.
        batches: The batches to take statistics from.
        run: Runs a model on a batch.

    Raises:
        ValueError: If there are no batches.
    """
    remaining = iter(batches)
    first = list(islice(remaining, 1))
    if not first:
        raise ValueError("There are no batches to estimate the statistics of batch normalisation from.")
    set_mode(model, training=False)
    tracking = _tracking(model)
    momenta = [norm.momentum for norm in tracking]
    for norm in tracking:
        norm.reset_running_stats()
        norm.training = True
        norm.momentum = None  # a plain mean instead of a moving one
    for batch in chain(first, remaining):
        run(model, batch)
    set_mode(model, training=False)
    for norm, momentum in zip(tracking, momenta, strict=True):
        norm.momentum = momentum


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running statistics of all batch normalisations, the numbers of batches among them."""
    statistics = []
    for norm in _tracking(model):
        statistics.append(norm.running_mean)
        statistics.append(norm.running_var)
        statistics.append(norm.num_batches_tracked)
    return [statistic for statistic in statistics if statistic is not None]


def _tracking(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations that keep running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]
