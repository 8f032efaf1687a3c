"""Statistics of batch normalisation that follow what is kept."""

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Estimate the running statistics of batch normalisation anew, in place, as the mean over some batches.

    Masks and removal change the statistics of the layers behind them; this corrects them without training. Everything
    but the statistics is left as it is, the mode of the modules included.

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
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = [(m, m.training) for m in model.modules()]
    batches = iter(batches)
    first = list(islice(batches, 1))
    if not first:
        raise ValueError("There are no batches to estimate the statistics of batch normalisation from.")
    momenta = [norm.momentum for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None
        for batch in chain(first, batches):
            (run or nn.Module.__call__)(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
