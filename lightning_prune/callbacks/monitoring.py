"""Monitoring: sub-networks are measured by what the module's own ``validation_step`` logs."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.callbacks.rehearsal import VALIDATION, Rehearsal, let_log, quietened
from lightning_prune.callbacks.run import Run
from lightning_prune.callbacks.state import State
from lightning_prune.callbacks.trainer_state import has_own
from lightning_prune.candidates import classification
from lightning_prune.candidates.measures import Evaluate, labelled
from lightning_prune.graph.entry import Step
from lightning_prune.graph.steps import run_step
from lightning_prune.surgery.compensation import METHODS

__all__ = ["check_candidates", "check_measure", "measure_in"]

_MODES = ("max", "min")
_END_OF_EPOCH = "on_validation_epoch_end"


def check_measure(evaluate: Evaluate | None, monitor: str | None, mode: str) -> None:
    """Raise a ValueError unless settings say in one way what is measured.

    Args:
        evaluate: A function that measures, if one was given.
        monitor: Name of a logged metric, if one was given.
        mode: ``"max"`` or ``"min"``.
    """
    if evaluate is not None and monitor is not None:
        raise ValueError(f"evaluate and monitor={monitor!r} both say what is measured; give one of them.")
    if mode not in _MODES:
        raise ValueError(f"mode must be 'max' or 'min', as for ModelCheckpoint; got {mode!r}.")


class Measuring(Protocol):
    """A callback that measures sub-networks while it runs."""

    evaluate: Evaluate | None
    monitor: str | None
    mode: str

    @property
    def run(self) -> Run: ...

    @property
    def state(self) -> State: ...


def check_candidates(compensate: str, batches: int) -> None:
    """Raise a ValueError unless candidates can be compensated in some way.

    Args:
        compensate: The setting ``compensate_candidates``.
        batches: The setting ``candidate_batches``.
    """
    if compensate not in METHODS:
        raise ValueError(f"compensate_candidates must be one of {', '.join(METHODS)}; got {compensate!r}.")
    if compensate != "none" and batches < 1:
        raise ValueError(
            f"compensate_candidates={compensate!r} looks at data: raise candidate_batches to 1 or more, or set "
            "compensate_candidates='none'."
        )


def measure_in(callback: Measuring) -> Evaluate:
    """Return what a callback measures its module with, and refuse labels that the module does not learn from.

    Args:
        callback: The callback, when training starts.

    Raises:
        ValueError: If the module has no ``validation_step`` to measure with, or labels make no difference to it.
    """
    trainer = callback.run.trainer
    module = trainer.lightning_module
    if callback.monitor is not None:
        if not has_own(module, VALIDATION):
            raise ValueError(
                f"monitor={callback.monitor!r} is measured by validation_step, which {type(module).__name__} does not "
                "have."
            )
        return _Monitored(trainer, callback.monitor, callback.mode)
    if callback.evaluate is not None:
        return callback.evaluate
    with isolate_rng():
        _refuse_unused_labels(Rehearsal(trainer, module, callback.state.training_batch_like))
    return classification


class _Monitored:
    """Measure a module by a metric that its ``validation_step`` logs, batch by batch.

    Args:
        trainer: The trainer.
        monitor: Name of the metric.
        mode: Which values of it are good.
    """

    def __init__(self, trainer: "pl.Trainer", monitor: str, mode: str) -> None:
        self._trainer = trainer
        self._monitor = monitor
        self._mode = mode

    def __call__(self, model: nn.Module, batch: Any) -> tuple[float, float]:
        """Return a loss and an accuracy: the metric itself if much of it is good, else what falls as it grows."""
        logged = logged_by(self._trainer, model, batch)
        if self._monitor not in logged:
            names = ", ".join(map(repr, logged)) or "nothing"
            raise ValueError(
                f"monitor={self._monitor!r} is not among what the validation of {type(model).__name__} logs: {names}."
            )
        value = logged[self._monitor]
        if self._mode == "max":
            return -value, value
        return value, 1 / (1 + value) if value >= 0 else 1 - value  # above 0, as an accuracy is


def logged_by(trainer: "pl.Trainer", model: nn.Module, batch: Any) -> dict[str, float]:
    """Return what the validation of a copy of the module logs on one batch, as if that was all.

    Args:
        trainer: The trainer.
        model: The copy; it is made to leave loggers and other ranks alone.
        batch: The batch.
    """
    logged: dict[str, Any] = {}
    step = Rehearsal(trainer, trainer.lightning_module).step(VALIDATION, batch)
    quietened(trainer, model)
    for module in model.modules():
        if isinstance(module, Metric):
            module.reset()
            vars(module)["sync_on_compute"] = False
    let_log(model, _Log(logged))
    if step is not None:
        method: Callable[..., Any] = getattr(model, VALIDATION)
        method(*step.args)
        if has_own(trainer.lightning_module, _END_OF_EPOCH):
            getattr(model, _END_OF_EPOCH)()
    return {name: _number(value) for name, value in logged.items() if _is_number(value)}


class _Log:
    """Note what is logged."""

    def __init__(self, logged: dict[str, Any]) -> None:
        self._logged = logged

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self._logged[name] = value


def _number(value: Any) -> float:
    if isinstance(value, Metric):
        value = value.compute()
    return float(value)


# -- labels ------------------------------------------------------------------------------------------------------------


def _refuse_unused_labels(rehearsal: Rehearsal) -> None:
    """Raise a ValueError if neither training nor validation depends on what would be taken for labels."""
    known: list[bool] = []
    for size in rehearsal.sizes(2):
        steps = rehearsal.steps(size)
        with suppress(Exception):  # of batches of another form, which are refused when they are measured
            known += [_depends_on_labels(rehearsal, step) for step in steps]
    if known and not any(known):
        raise ValueError(
            f"{type(rehearsal.pl_module).__name__} does not learn from the labels that are in its batches, so that its "
            "accuracy would mean nothing; name a metric that its validation_step logs with monitor, or give evaluate."
        )


def _depends_on_labels(rehearsal: Rehearsal, step: Step) -> bool:
    """Tell whether a step comes to something else with other labels."""
    batch, *others = step.args
    inputs, labels = labelled(batch)
    classes = max(2, int(labels.max()) + 1)
    relabelled = [inputs, (labels + 1) % classes]
    changed = replace(step, args=(relabelled, *others), hooks={})
    return _outcome(rehearsal, replace(step, hooks={})) != _outcome(rehearsal, changed)


def _outcome(rehearsal: Rehearsal, step: Step) -> list[float]:
    """Return the numbers that a step returns and logs."""
    logged: dict[str, Any] = {}

    def prepare(model: nn.Module) -> None:
        step.prepare(model)
        let_log(model, _Log(logged))
        vars(model)["manual_backward"] = partial(_Log(logged), "manual_backward")

    torch.manual_seed(0)
    returned = run_step(rehearsal.pl_module, replace(step, prepare=prepare))
    logged.update(returned if isinstance(returned, Mapping) else {"returned": returned})
    return [_number(value) for value in logged.values() if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Metric) or (isinstance(value, Tensor) and value.numel() == 1)
