"""Isolation of a model that is measured: nothing that a measurement does is seen by the model, or by other ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compiled import as_written
from lightning_prune.graph.twin import Twin, twin_in_evaluation

__all__ = ["of_twin", "undisturbed", "without_other_ranks"]

Measure = TypeVar("Measure", bound=Callable[[nn.Module, Any], Any])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Twin]:
    """Make a twin of a model to be measured, in evaluation mode; give the random state back as it was.

    Args:
        model: The model. No gradients are recorded, and what has been compiled runs as it was written.
    """
    with twin_in_evaluation(model) as twin, torch.no_grad(), as_written():
        without_other_ranks(twin.model)
        yield twin


def without_other_ranks(model: nn.Module) -> None:
    """Let a twin or a copy of a model not wait for other ranks, which run other candidates.

    Args:
        model: The twin or copy.
    """
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            vars(module)["forward"] = partial(_BatchNorm.forward, module)


def of_twin(evaluate: Measure, twin: Twin) -> Measure:
    """Return what measures a twin: for a method of the model, that of its twin.

    Args:
        evaluate: What measures the model, a function of the model and a batch.
        twin: A twin of the model.
    """
    is_method = isinstance(evaluate, MethodType) and evaluate.__self__ in twin
    followed: Measure = twin.of(evaluate) if is_method else evaluate
    return followed
