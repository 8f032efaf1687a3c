"""Rehearsal: the steps of a module, to be run on twins of it, where trainer, loggers and optimizers do not notice."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_prune.callbacks.batches import gives_samples, load_validation_split, moved, samples, validating
from lightning_prune.callbacks.descriptions import described, like
from lightning_prune.callbacks.trainer_state import has_own
from lightning_prune.callbacks.trial_run import epochs_of
from lightning_prune.compiled import as_written
from lightning_prune.graph.entry import Step
from lightning_prune.graph.neutral import preserving_random_state
from lightning_prune.graph.steps import run_step
from lightning_prune.graph.twin import Twin, set_mode
from lightning_prune.namesakes import namesakes

__all__ = ["TRAINING", "VALIDATION", "Backward", "Rehearsal", "let_log", "quiet_trainer", "quietened"]

TRAINING = "training_step"
VALIDATION = "validation_step"

Backward = Callable[..., None]
Hook = Callable[[Any], tuple[Any, ...]]

_AFTER_A_STEP = (
    "on_after_backward", "optimizer_step", "on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end",
)  # fmt: skip
_RARELY_UPDATE = frozenset({"on_train_batch_start", "on_before_optimizer_step"})  # and may look for gradients
_LATE = 720_720  # optimizer steps; a multiple of every number up to 16, of which some do something every so many

_DONE_BY_THE_TRAINER = (
    "log",
    "log_dict",
    "print",
    "manual_backward",
    "clip_gradients",
    "toggle_optimizer",
    "untoggle_optimizer",
)


class Rehearsal:
    """The steps of a LightningModule on batches of a few samples, to be run on twins of it.

    Drawing these makes no difference to training: they come from the data sets themselves, but where a loader has none
    that can be asked for samples.

    Args:
        trainer: The trainer.
        pl_module: The LightningModule.
        batch_like: What the training batch is like, if a run that is resumed must not draw one again.
        epoch: The epoch that steps find themselves in; default the present one.
        global_step: The number of optimizer steps before them; default what the trainer says.

    Attributes:
        keeps_copies: Whether the module may bring copies of weights up to date at the end of an epoch.
        batch_like: The same, for a run that is resumed from this one; None where it may draw one.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch_like: Any = None,
        epoch: int | None = None,
        global_step: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.epoch = last_epoch(trainer) if epoch is None else epoch
        self.global_step = global_step
        self.pl_module = pl_module
        self.batch_like = batch_like
        self._loaders, self._structure = tree_flatten(trainer.train_dataloader)
        self._can_choose = all(gives_samples(loader) for loader in self._loaders)
        self.keeps_copies = False
        self._only_batch: Any = None
        self._last_batch: Any = None

    def later(self) -> "Rehearsal":
        """Return a rehearsal of what the same steps do once all that warms up has done so."""
        epochs = epochs_of(self.trainer)
        last = epochs - 1 if epochs else _LATE
        made = copy.copy(self)
        made.epoch = max(last, self.epoch)
        made.global_step = _LATE
        return made

    def sizes(self, first: int = 1) -> list[int]:
        """Return numbers of samples to try, one after the other: losses may need two, or as many as there will be.

        Args:
            first: The one to begin with.
        """
        if not self._can_choose:
            return [0]
        whole = max((getattr(loader, "batch_size", None) or 1 for loader in self._loaders), default=1)
        return list(dict.fromkeys([min(first, whole), min(2, whole), whole]))

    def steps(self, size: int, with_hooks: bool = False) -> list[Step]:
        """Return the steps that the module has, on batches of some samples.

        Args:
            size: How many; a loader that cannot be asked for samples gives as many as it does.
            with_hooks: Whether the hooks of the module around a training step belong to it.
        """
        found = [self._training(size), self._validation(size)]
        steps = [step for step in found if step is not None]
        return steps if with_hooks else [replace(step, hooks={}) for step in steps]

    def attempts(self, first: int) -> Iterator[list[Step]]:
        """Yield steps to be traced, of which the first that can be are to be taken.

        Args:
            first: Number of samples to begin with.
        """
        own = {name for name in (*_AFTER_A_STEP, *_RARELY_UPDATE) if has_own(self.pl_module, name)}
        choices = [own, own - _RARELY_UPDATE, set[str]()]
        for names in [one for place, one in enumerate(choices) if one not in choices[:place]]:
            for size in self.sizes(first):
                found = self.steps(size, with_hooks=True)
                yield [_with_hooks(step, names) for step in found]

    @property
    def serves_as_it_likes(self) -> bool:
        """Whether a loader makes its batches by itself, which those of a data set may be unlike."""
        return any(
            isinstance(one, DataLoader) and type(one).__iter__ is not DataLoader.__iter__ for one in self._loaders
        )

    def first_steps(self, with_hooks: bool = False) -> Iterator[Step]:
        """Yield steps on ever more samples, for those who look for one that works.

        Args:
            with_hooks: Whether the hooks of the module around a training step belong to it.
        """
        for size in self.sizes():
            yield from self.steps(size, with_hooks)

    def entry(self) -> Step:
        """Return the step by which a module without ``forward`` is entered: the one that measures it, if it has one.

        Raises:
            ValueError: If it has none.
        """
        for size in self.sizes():
            for step in reversed(self.steps(size)):
                if self._works(step):
                    return replace(step, training=False)
        raise ValueError(
            f"No example input is to be had from a batch of type {type(self._last_batch).__name__}, as no step of "
            f"{type(self.pl_module).__name__} works with it on a copy; set example_input_array on it, or "
            "example_inputs on the callback."
        )

    def forward_takes(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Tell whether the ``forward`` of the module can be called in some way, with data."""
        args, kwargs = call
        return self._works(Step("forward", args, False, self._prepare), **kwargs)

    def gradients(self, watch: Callable[[nn.Module], Backward]) -> bool:
        """Run the training step of a twin with all that its backward passes compute.

        Args:
            watch: Given the twin, returns what is to be called for each loss instead of ``loss.backward()``.

        Returns:
            Whether the step works on its own.
        """
        for size in self.sizes():
            step = self._training(size)
            if step is None:
                return False
            try:
                self._run_with_gradients(replace(step, hooks={}), watch)
            except Exception:  # of a step that does not work on this batch
                continue
            return True
        return False

    def _run_with_gradients(self, step: Step, watch: Callable[[nn.Module], Backward]) -> None:
        with torch.inference_mode(False), torch.enable_grad(), preserving_random_state(self.pl_module), as_written():
            twin = Twin(self.pl_module).model
            set_mode(twin, training=True)
            run = step.ready(twin)
            backward = watch(twin)
            vars(twin)["manual_backward"] = backward
            for number in (0, 1):  # of the batch, by which some take turns
                returned = run(step.args[0], *[number][: len(step.args) - 1], *step.args[2:])
                loss = returned.get("loss") if isinstance(returned, Mapping) else returned
                if isinstance(loss, Tensor) and self.pl_module.automatic_optimization:
                    backward(loss)

    def _prepare(self, model: nn.Module) -> None:
        _prepare(quiet_trainer(self, model), model)

    def step(self, name: str, batch: Any) -> Step | None:
        """Return a step on a batch; None if the module has no such step, or draws batches by itself.

        Args:
            name: `TRAINING` or `VALIDATION`.
            batch: The batch.
        """
        if not has_own(self.pl_module, name):
            return None
        parameters = inspect.signature(getattr(self.pl_module, name)).parameters
        if "dataloader_iter" in parameters:
            return None
        args = _arguments(list(parameters.values()), batch)
        hooks = self._hooks(batch) if name == TRAINING else {}
        return Step(name, args, name == TRAINING, self._prepare, hooks)

    def _hooks(self, batch: Any) -> dict[str, Hook]:
        """Return the hooks of the module around a training step, with what they are given."""
        optimizers = [_QuietOptimizer(optimizer) for optimizer in self.trainer.optimizers]
        hooks: dict[str, Hook] = {
            "on_after_backward": lambda output: (),
            "optimizer_step": lambda output: (0, 0, *optimizers[:1], _do_nothing),
            "on_before_zero_grad": lambda output: tuple(optimizers[:1]),
            "on_train_batch_start": lambda output: (batch, 0),
            "on_train_batch_end": lambda output: ({"loss": output}, batch, 0),
            "on_before_optimizer_step": lambda output: tuple(optimizers[:1]),
        }
        if self.keeps_copies:  # else there is no reason to run what may write files
            hooks["on_train_epoch_end"] = lambda output: ()
        return {name: given for name, given in hooks.items() if has_own(self.pl_module, name)}

    def _works(self, step: Step, **named: Any) -> bool:
        try:
            run_step(self.pl_module, step, **named)
        except Exception:
            return False
        return True

    def _training(self, size: int) -> Step | None:
        with isolate_rng():
            batch = self._training_batch(size)
        self._last_batch = batch
        return None if batch is None else self.step(TRAINING, batch)

    def _training_batch(self, size: int) -> Any:
        if self._can_choose:
            drawn = [samples(loader, _first(loader, size)) for loader in self._loaders]
            return moved(self.trainer, tree_unflatten(drawn, self._structure))
        if self._only_batch is None and self.batch_like is not None:
            self._only_batch = move_data_to_device(like(self.batch_like), self.pl_module.device)
        if self._only_batch is None:
            drawn = [next(iter([] if loader is None else loader), None) for loader in self._loaders]
            self._only_batch = moved(self.trainer, tree_unflatten(drawn, self._structure))
            self.batch_like = described(self._only_batch)
        return self._only_batch

    def _validation(self, size: int) -> Step | None:
        if not has_own(self.pl_module, VALIDATION):
            return None
        with validating(self.trainer):
            load_validation_split(self.trainer)
            loaders = tree_leaves(self.trainer.val_dataloaders)
            if not loaders or not gives_samples(loaders[0]) or not _first(loaders[0], 1):
                return None
            positions = _first(loaders[0], max(size, 1))
            batch = moved(self.trainer, samples(loaders[0], positions))
        return self.step(VALIDATION, batch)


def _with_hooks(step: Step, names: set[str]) -> Step:
    return replace(step, hooks={name: given for name, given in step.hooks.items() if name in names})


def _first(loader: Any, size: int) -> list[int]:
    """Return the positions of the first samples of a loader."""
    available = len(loader.dataset)
    return list(range(min(size, available)))


def _arguments(parameters: list[inspect.Parameter], batch: Any) -> tuple[Any, ...]:
    """Return the batch, its number, and the number of its loader, as many of them as a step takes."""
    takes_more = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = [one for one in positional if one.default is one.empty or one.name == "batch_idx"]
    count = 2 if takes_more else len(required)
    return (batch, 0, 0)[: max(1, count)]


def quiet_trainer(rehearsal: Rehearsal, model: nn.Module) -> Any:
    """Return what callbacks may be given in place of the trainer, with a copy of its module."""
    return _QuietTrainer(rehearsal.trainer, rehearsal.epoch, model, rehearsal.global_step)


def quietened(trainer: "pl.Trainer", model: nn.Module) -> None:
    """Let the steps of a copy of the module of a trainer leave loggers and optimizers alone.

    Args:
        trainer: The trainer.
        model: The copy.
    """
    _prepare(_QuietTrainer(trainer, last_epoch(trainer), model), model)


def let_log(model: nn.Module, log: Callable[..., None]) -> None:
    """Let all that a quietened copy logs be handed to a function; what is logged at once comes name by name.

    Args:
        model: The copy.
        log: Takes what ``self.log`` is given.
    """
    for module in model.modules():
        if isinstance(module, namesakes(pl.LightningModule)):
            vars(module)["log"] = log
            vars(module).pop("log_dict", None)  # that of the class hands all to `log`


def last_epoch(trainer: "pl.Trainer") -> int:
    """Return the epoch that a trainer is in; after the last one, where Lightning counts on, that one."""
    epochs = trainer.max_epochs
    return trainer.current_epoch if epochs in (None, -1) else min(trainer.current_epoch, epochs - 1)


def _prepare(quiet: "_QuietTrainer", model: nn.Module) -> None:
    """Give a twin of a LightningModule stand-ins of all that its steps may change beside the module."""
    for module in model.modules():
        attributes = vars(module)
        if isinstance(module, namesakes(pl.LightningModule)):
            attributes.update(dict.fromkeys(_DONE_BY_THE_TRAINER, _do_nothing))
            attributes["_trainer"] = quiet
            attributes["optimizers"] = partial(_alone_or_all, quiet.optimizers)
            attributes["lr_schedulers"] = partial(_alone_or_all, quiet.lr_schedulers)
            attributes["all_gather"] = partial(_gathered, quiet.world_size)
        elif isinstance(module, nn.SyncBatchNorm) and not _is_without_data(model):
            attributes["forward"] = partial(_BatchNorm.forward, module)
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
    return tree_map_only(Tensor, lambda tensor: torch.stack([tensor] * ranks), data)


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
        epoch: The epoch that it is said to be in.
        model: The twin that stands in for its module.
        global_step: The number of optimizer steps that it is said to have made; default those that it has.
    """

    def __init__(self, trainer: "pl.Trainer", epoch: int, model: nn.Module, global_step: int | None = None) -> None:
        self._asked = trainer
        self.current_epoch = epoch
        self.global_step = trainer.global_step if global_step is None else global_step
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
