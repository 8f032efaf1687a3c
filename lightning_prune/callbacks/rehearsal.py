"""Rehearsal: the steps of a module, to be run on twins of it, where trainer, loggers and optimizers do not notice."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, MetricCollection

from lightning_prune.graph.steps import Step

__all__ = ["TRAINING", "VALIDATION", "step_of"]

TRAINING = "training_step"
VALIDATION = "validation_step"

_DONE_BY_THE_TRAINER = (
    "log",
    "log_dict",
    "print",
    "manual_backward",
    "clip_gradients",
    "toggle_optimizer",
    "untoggle_optimizer",
)


def step_of(trainer: "pl.Trainer", pl_module: "pl.LightningModule", name: str, batch: Any) -> Step | None:
    """Return a step of a module on a batch; None if the module has no such step, or draws batches by itself.

    Args:
        trainer: The trainer.
        pl_module: The LightningModule.
        name: `TRAINING` or `VALIDATION`.
        batch: The batch.
    """
    if not is_overridden(name, pl_module):
        return None
    parameters = inspect.signature(getattr(pl_module, name)).parameters
    if "dataloader_iter" in parameters:
        return None
    args = _arguments(list(parameters.values()), batch)
    return Step(name, args, name == TRAINING, partial(_prepare, trainer))


def _arguments(parameters: list[inspect.Parameter], batch: Any) -> tuple[Any, ...]:
    """Return the batch, its number, and the number of its loader, as many of them as a step takes."""
    takes_more = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = [one for one in positional if one.default is one.empty or one.name == "batch_idx"]
    count = 2 if takes_more else len(required)
    return (batch, 0, 0)[: max(1, count)]


def _prepare(trainer: "pl.Trainer", model: nn.Module) -> None:
    """Give a twin of a LightningModule stand-ins of all that its steps may change beside the module."""
    quiet = _QuietTrainer(trainer, model)
    for module in model.modules():
        attributes = vars(module)
        if isinstance(module, pl.LightningModule):
            attributes.update(dict.fromkeys(_DONE_BY_THE_TRAINER, _do_nothing))
            attributes["_trainer"] = quiet
            attributes["optimizers"] = partial(_alone_or_all, quiet.optimizers)
            attributes["lr_schedulers"] = partial(_alone_or_all, quiet.lr_schedulers)
            attributes["all_gather"] = partial(_gathered, trainer.world_size)
        elif isinstance(module, Metric | MetricCollection) and _is_without_data(model):
            attributes["forward"] = partial(_measured, module)
            attributes["update"] = _do_nothing
            attributes["compute"] = partial(_measured, module)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _alone_or_all(made: list[Any], use_pl_optimizer: bool = True) -> Any:
    return made[0] if len(made) == 1 else made


def _gathered(ranks: int, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
    """Return what a rank gathers if all ranks have what it has."""
    if ranks == 1:
        return data
    return tree_map_only(torch.Tensor, lambda tensor: torch.stack([tensor] * ranks), data)


def _is_without_data(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _measured(metric: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what stands in for a metric of tensors without data."""
    if isinstance(metric, MetricCollection):
        return {name: torch.zeros(()) for name in metric.keys()}  # noqa: SIM118, which is of the collection
    return torch.zeros(())


class _QuietTrainer:
    """A trainer to ask, whose loggers, optimizers and module are stand-ins.

    Args:
        trainer: The trainer.
        model: The twin that stands in for its module.
    """

    def __init__(self, trainer: "pl.Trainer", model: nn.Module) -> None:
        self._asked = trainer
        self.lightning_module = self.model = model
        self.optimizers = [_QuietOptimizer(optimizer) for optimizer in trainer.optimizers]
        configured = trainer.lr_scheduler_configs
        self.lr_schedulers = [_QuietScheduler(config.scheduler) for config in configured]
        self.loggers = [DummyLogger() for _ in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked, name)


class _QuietOptimizer:
    """An optimizer to ask that does not step."""

    def __init__(self, optimizer: Any) -> None:
        self._asked = optimizer
        self.param_groups = [dict(group) for group in optimizer.param_groups]
        self.optimizer = self

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked, name)


class _QuietScheduler:
    """A scheduler of the learning rate to ask that does not step."""

    def __init__(self, scheduler: Any) -> None:
        self._asked = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked, name)
