"""Statistics of batch normalisation that follow what is kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.modes import evaluating

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Estimate the running statistics of batch normalisation anew, in place, as the mean over some batches.

    Masks and pruning change the statistics of the layers behind them; this corrects them without training. Nothing
    but the statistics changes, and the modules are in the mode they were in afterwards. If anything fails, the
    statistics are as they were.

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
    run = run or nn.Module.__call__
    remaining = iter(batches)
    first = list(islice(remaining, 1))
    if not first:
        raise ValueError("There are no batches to estimate the statistics of batch normalisation from.")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [norm for norm in norms if norm.running_mean is not None]
    with evaluating(model), _averaging(tracking):
        for batch in chain(first, remaining):
            run(model, batch)


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let layers average the statistics of all batches that they see; the mode is for the caller to restore."""
    momenta = [norm.momentum for norm in norms]
    earlier = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.training = True
            norm.momentum = None  # a plain mean instead of a moving one
        yield
    except BaseException:
        for buffer, statistic in earlier:
            buffer.copy_(statistic)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
