"""The base of all pruning callbacks: schedule, budget, ranks, surgery, checkpoint and logging."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_prune import criteria
from lightning_prune.planning import allocation
from lightning_prune.planning.cost import check_metric
from lightning_prune.callbacks import trainer_state
from lightning_prune.callbacks.recording import Recorder
from lightning_prune.compiled import forget_compiled
from lightning_prune.criteria.registry import find, needs_data
from lightning_prune.ddp import rewrap
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.progress import progress, show_with
from lightning_prune.reporting.history import History
from lightning_prune.callbacks.bars import follow
from lightning_prune.reporting.loggers import folder, say, warn
from lightning_prune.surgery import check, prune

__all__ = ["PruningCallback"]


class PruningCallback(Callback):
    """Prune a network step by step while it trains, by the norm of its filters or another criterion.

    At the start of every ``every_n_epochs``-th epoch, from ``start_epoch`` on, the channels that matter least leave
    for good, until after ``steps`` prunes the budget is met. Training then goes on: optimizers keep their state,
    distributed training is wrapped anew, and checkpoints hold the plan, so that a run resumes in the pruned shape. With
    ``fast_dev_run`` the whole budget goes before the last training batch, or after the only one, to show that all of
    it works.

    Subclasses say how to rank: see `scores`.

    Args:
        keep: Fraction of the original cost that stays in the end, in (0, 1].
        metric: What the fraction is of: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"``: the time of a
            forward pass of the example inputs in evaluation mode, measured on the device of the first rank.
        start_epoch: Number of epochs to train before the first prune, at least 0.
        every_n_epochs: Number of epochs from one prune to the next, at least 1.
        steps: Number of prunes; the cost goes down by the same amount at each.
        round_to: Layers that lose channels keep a multiple of this many; for latency also ``"auto"``, the multiple
            that keeps most on this device.
        min_channels: Least number of channels of a group.
        ignore: Patterns of module names (``"network.layer1.*"``) whose channels stay whole.
        module: Dotted name of the part to prune; default the whole LightningModule.
        example_inputs: What the ``forward`` of that part takes: a tensor, a tuple, a dictionary, or in YAML the shape
            of one tensor as a list of numbers. Default: ``example_input_array`` of the LightningModule, else the first
            training batch.
        criterion: What ranks the channels: a name in ``lightning_prune.criteria.CRITERIA`` or the import path of a
            function, with settings as a mapping such as ``{"name": "magnitude", "p": 2}``; one that needs no data.

    Raises:
        ValueError: If a setting is out of range; when training starts also if the budget cannot be reached, the
            schedule does not fit into the run, a pattern matches nothing or no example input is to be had.

    Example:
        >>> callback = PruningCallback(keep=0.5, steps=3, start_epoch=2)
        >>> [callback.keep_after(step) for step in range(4)]
        [1.0, 0.8333333333333334, 0.6666666666666667, 0.5]
    """

    cap: ClassVar[float] = 1.0  # greatest fraction of its channels that a group may lose

    def __init__(
        self,
        keep: float = 0.5,
        metric: str = "flops",
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        steps: int = 1,
        round_to: int | str = 8,
        min_channels: int = 1,
        ignore: Sequence[str] = (),
        module: str = "",
        example_inputs: Any = None,
        criterion: str | dict[str, Any] = "l1",
    ) -> None:
        allocation.check_keep(keep)
        check_metric(metric)
        for name, value, least in (
            ("start_epoch", start_epoch, 0),
            ("every_n_epochs", every_n_epochs, 1),
            ("steps", steps, 1),
            ("round_to", 1 if (metric, round_to) == ("latency", "auto") else round_to, 1),
            ("min_channels", min_channels, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
        self.keep = keep
        self.metric = metric
        self.start_epoch = start_epoch
        self.every_n_epochs = every_n_epochs
        self.steps = steps
        self.round_to = round_to
        self.min_channels = min_channels
        self.ignore = [ignore] if isinstance(ignore, str) else list(ignore)
        self.module = module
        self.example_inputs = example_inputs
        self.criterion = criterion
        self.check_criterion()
        self.steps_done = 0
        self.history: History | None = None
        self.batch_like: dict[str, Any] | None = None
        self._graph: ChannelGraph | None = None
        self._recorder: Recorder | None = None
        self._trained: ref[pl.LightningModule] | None = None  # the module of the last run
        self._untried: list[str] = []  # the groups that have lost channels since the last training step
        self._epoch: int | None = None  # the epoch that has begun

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        """Rank the channels; called at each prune, with the same result on every rank.

        Args:
            trainer: The trainer.
            graph: The traced model; ``graph.model`` is the LightningModule.

        Returns:
            (channels,) score of each group, higher is kept; ``-inf`` for channels that have been removed.
        """
        return criteria.score(graph, self.criterion)

    def check_criterion(self) -> None:
        """Raise a ValueError unless `scores` can be worked out by the criterion; called by the constructor."""
        if needs_data(find(self.criterion)):
            raise ValueError(
                f"Criterion {self.criterion!r} needs data, and {type(self).__name__} ranks by the weights alone; use "
                "TaylorRankCallback, or rank with lightning_prune.criteria.score."
            )

    def check_budget(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        """Raise a ValueError if the budget cannot be reached; called when training starts."""
        limits = self.round_to, self.min_channels, self.cap
        with progress(f"Measuring the {self.metric} of {type(graph.model).__name__}"):
            trainer_state.decided_by_first_rank(
                trainer, lambda: allocation.check_reachable(graph, self.keep, self.metric, *limits)
            )

    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        """Make the plan for one prune, on the first rank; by default all channels compete for the budget.

        Args:
            graph: The traced model.
            scores: What `scores` returned.
            keep: Fraction of the original cost that may stay.
        """
        return allocation.plan(graph, scores, keep, self.metric, self.round_to, self.min_channels)

    def ready(self) -> bool:
        """Tell whether all that ranking needs is there; a prune that is due waits for it."""
        return True

    # -- the schedule ----------------------------------------------------------------------------------------------

    def keep_after(self, step: int) -> float:
        """Return the fraction of the original cost that stays after a number of prunes."""
        return 1 - (1 - self.keep) * step / self.steps if step < self.steps else float(self.keep)

    def steps_due(self, epoch: int) -> int:
        """Return how many prunes an epoch starts with behind it."""
        if epoch < self.start_epoch:
            return 0
        return min(self.steps, (epoch - self.start_epoch) // self.every_n_epochs + 1)

    @property
    def last_prune_epoch(self) -> int:
        """The epoch that the last prune comes before."""
        return self.start_epoch + (self.steps - 1) * self.every_n_epochs

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        trainer_state.refuse_strategy(trainer)
        trainer_state.refuse_other_callbacks(trainer, self)
        follow(trainer)
        if stage == "fit":
            trainer_state.refuse_short_run(trainer, self)
            known = self._trained is not None and self._trained() is pl_module
            if not known or plan_in_force(pl_module) is None:
                self._start_anew()  # before the state of a run that is resumed is loaded
            self._trained = ref(pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        with trainer_state.unlogged(pl_module):
            self.prepare(trainer, pl_module)

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Trace the model, and refuse what cannot work; called when training starts."""
        check(pl_module, trainer.optimizers)
        inputs = trainer_state.example_inputs(trainer, pl_module, self.module, self.example_inputs, self.batch_like)
        if self.example_inputs is None and pl_module.example_input_array is None:
            # A resumed run must not look at a batch again: loaders that know their position would lose it.
            self.batch_like = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        self._graph = trace(pl_module, inputs, module=self.module, ignore=self.ignore)
        trainer_state.refuse_averaged_models(pl_module, self._graph)
        if not self._graph.groups:
            reasons = "; ".join(held.reason for held in self._graph.unprunable.values())
            raise ValueError(f"{type(self).__name__} finds nothing to prune: {reasons or 'no layer makes channels'}.")
        if self.steps_done < self.steps:
            self.check_budget(trainer, self._graph)
        self._recorder = Recorder(trainer, self._graph, self.history)
        self._recorder.begin(self)
        self.history = self._recorder.history

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._begin_once(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # A run that resumes in the middle of an epoch, or right after its last batch, starts without the hook above.
        self._begin_once(trainer, pl_module)

    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Prune if it is time; called once before the first batch of each epoch, or of what is left of it."""
        # Checkpoints of an epoch are written before the next one starts, so each holds the network as it was trained
        # and a resumed run prunes from the same state as an unbroken one.
        due = self.steps_due(trainer.current_epoch)
        if due > self.steps_done and self.ready():
            if due > self.steps_done + 1:
                warn(
                    f"Prunes {self.steps_done + 1} to {due} of {self.steps} happen at once, before epoch "
                    f"{trainer.current_epoch}: the run goes on from a checkpoint without them. To spread them, raise "
                    "start_epoch."
                )
            self._prune(trainer, pl_module, due)
        assert self._recorder is not None
        for metric, fraction in self._recorder.kept.items():
            trainer_state.log_epoch(pl_module, f"{folder(self.module)}/keep_{metric}", fraction)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._untried = []
        # A run of a few batches that is to show whether all works, the prune and what comes after it among that.
        due = batch_idx + 1 == max(1, trainer.num_training_batches - 1)
        if trainer.fast_dev_run and due and self.steps_done < self.steps and self.ready():  # type: ignore[attr-defined]
            self._prune(trainer, pl_module, self.steps)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._recorder is not None:  # not before training has started, nor after it
            self._recorder.add_validation()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._warn_if_short()
        assert self._recorder is not None
        with trainer_state.unlogged(pl_module):
            self._recorder.end()  # later hooks find the module on the CPU again, whatever it was trained on

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._recorder is not None:  # a run that is resumed after its end does not train
            self._recorder.tell()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if self._untried and isinstance(exception, RuntimeError):
            warn(
                f"This was the first training step after channels of {', '.join(self._untried)} have left. Where "
                "training_step or a hook hands what is inside the network to a layer that forward does not run, that "
                "layer stays as it was: put the layer that it reads into ignore, or let forward run both."
            )
        self._let_go()

    # -- checkpoint ------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    @override
    def state_dict(self) -> dict[str, Any]:
        history = None if self.history is None else self.history.to_json()
        return {"steps_done": self.steps_done, "batch_like": self.batch_like, "history": history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_done, self.batch_like = state_dict["steps_done"], state_dict["batch_like"]
        self.history = History.from_json(state_dict["history"]) if state_dict.get("history") else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to modules out of copies and pickles."""
        state = {name: value for name, value in self.__dict__.items() if name != "log"}
        return state | {"_graph": None, "_recorder": None, "_trained": None}

    def _begin_once(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            self.begin_epoch(trainer, pl_module)

    # -- one prune -------------------------------------------------------------------------------------------------

    def _prune(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        assert self._graph is not None
        doing = f"Pruning {type(pl_module).__name__}, step {step} of {self.steps}"
        with trainer_state.unlogged(pl_module), progress(doing):
            scores = self.scores(trainer, self._graph)
            keep = self.keep_after(step)
            plan = trainer_state.agree(trainer, partial(self.allocate, self._graph, scores, keep))
            report = prune(pl_module, plan, trainer.optimizers)
            for averaged in trainer_state.averaged_copies(trainer):
                prune(averaged, plan)
            rewrap(trainer)
            forget_compiled()
        self.steps_done, self._untried = step, list(report.widths)
        if not report.widths:
            warn(
                f"Prune {step} of {self.steps} removed nothing: the next smaller network in steps of "
                f"round_to={self.round_to} is below the budget. Lower round_to, or take fewer steps."
            )
        say(f"{self._headline(trainer, plan, step)}\n{report}")
        assert self._recorder is not None
        with trainer_state.unlogged(pl_module):
            self._recorder.add_prune(plan, step, scores)

    def _headline(self, trainer: "pl.Trainer", plan: PruningPlan, step: int) -> str:
        budget = plan.budget or {}
        told = ", ".join(f"{budget[name]:.3f} {name}" for name in ("asked", "rounded", "achieved") if name in budget)
        return f"Prune {step} of {self.steps} before epoch {trainer.current_epoch}: {self.metric} {told}"

    def _warn_if_short(self) -> None:
        # Not what the plan in force says: another callback may have pruned another part after this one.
        prunes = self.history.prunes if self.history is not None else []
        kept = prunes[-1].budget.get("achieved", 1.0) if prunes else 1.0
        if self.steps_done >= self.steps and kept <= self.keep:
            return
        warn(
            f"Training has ended with {kept:.3f} of the {self.metric} where keep={self.keep} was asked for, "
            f"after {self.steps_done} of {self.steps} prunes: prunes happen before epochs {self.start_epoch} to "
            f"{self.last_prune_epoch} (counted from 0), once each."
        )

    def _start_anew(self) -> None:
        """Forget what is known of a module that was trained before, to the end or not."""
        self.steps_done, self.history, self.batch_like = 0, None, None

    def _let_go(self) -> None:
        """Drop every reference to modules."""
        self._graph = self._recorder = self._epoch = None
        self._untried = []
        show_with(None)
        self.__dict__.pop("log", None)  # Lightning gives every callback the module's bound method
