"""The state of a Trainer, as far as pruning callbacks need it: copies of the module, loss scale, logging, metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.namesakes import namesakes

__all__ = [
    "averaged_copies", "averages", "has_own", "is_fitting", "is_validation_metric", "log_epoch", "log_mean",
    "loss_scale", "metrics", "unlogged",
]  # fmt: skip


def is_fitting(trainer: "pl.Trainer") -> bool:
    """Tell whether a trainer is training, rather than validating, testing or predicting alone.

    Args:
        trainer: The trainer.
    """
    function = trainer.state.fn
    return function is not None and function.value == TrainerFn.FITTING.value


def has_own(pl_module: "pl.LightningModule", name: str) -> bool:
    """Tell whether a LightningModule, of either package, has a method of its own in place of Lightning's.

    Args:
        pl_module: The LightningModule.
        name: Name of the method.
    """
    kinds = namesakes(pl.LightningModule)
    parent = next(kind for kind in kinds if isinstance(pl_module, kind))
    return is_overridden(name, pl_module, parent)


def averages(trainer: "pl.Trainer") -> list[AveragedModel]:
    """Return the averages that `WeightAveraging` callbacks keep of the module."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kinds = namesakes(WeightAveraging)
    found = [callback._average_model for callback in callbacks if isinstance(callback, kinds)]
    return [average for average in found if average is not None]


def averaged_copies(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the copies of the module whose weights `WeightAveraging` callbacks average."""
    return [average.module for average in averages(trainer)]


def loss_scale(trainer: "pl.Trainer") -> float:
    """Return what mixed precision multiplies losses by before their gradients are computed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def log_epoch(pl_module: "pl.LightningModule", name: str, value: float) -> None:
    """Log a number that holds for the epoch that begins."""
    # Lightning would look for the batch size in a batch that need not have been drawn yet, nor be made of tensors.
    pl_module.log(name, value, on_step=False, on_epoch=True, rank_zero_only=True, batch_size=1)


def log_mean(pl_module: "pl.LightningModule", name: str, value: Tensor, samples: int) -> None:
    """Log the mean over an epoch, and over the ranks, of a number that each step has."""
    pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)


@contextmanager
def unlogged(model: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing for a while, in which a callback runs the model: these are no steps of training."""
    kinds = namesakes(pl.LightningModule)
    modules = [vars(module) for module in model.modules() if isinstance(module, kinds)]
    logs_before = [attributes.get("log") for attributes in modules]
    try:
        for attributes in modules:
            attributes["log"] = _log_nothing
        yield
    finally:
        for attributes, log in zip(modules, logs_before, strict=True):
            attributes.pop("log")
            if log is not None:
                attributes["log"] = log


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def metrics(trainer: "pl.Trainer") -> dict[str, float]:
    """Return the metrics of the last validation."""
    found = {}
    for name, value in sorted(trainer.callback_metrics.items()):
        if is_validation_metric(name):
            found[name] = float(value)
    return found


def is_validation_metric(name: str) -> bool:
    """Tell whether what is logged under a name is a metric of validation."""
    return name.startswith("val") and not name.endswith(("_step", "_epoch"))
