"""The base of all pruning callbacks: schedule, budget, ranks, surgery, checkpoint and logging."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune import allocation
from lightning_prune.budget import CostModel, check_metric
from lightning_prune.callbacks import trainer_state
from lightning_prune.criteria import magnitude
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.channel_graph import plan_in_force
from lightning_prune.plan import PruningPlan
from lightning_prune.reporting.summary import Measurement, log_prune, summarize, whereabouts
from lightning_prune.surgery import check, prune

__all__ = ["PruningCallback"]


class PruningCallback(Callback):
    """Prune a network step by step while it trains, by the norm of its filters.

    At the start of every ``every_n_epochs``-th epoch, from ``start_epoch`` on, the channels that matter least leave
    for good, until after ``steps`` prunes the budget is met. Training then goes on: optimizers keep their state,
    distributed training is wrapped anew, and checkpoints hold the plan, so that a run resumes in the pruned shape.

    Subclasses say how to rank: see `scores`.

    Args:
        keep: Fraction of the original cost that stays in the end, in (0, 1].
        metric: What the fraction is of: ``"flops"``, ``"params"`` or ``"channels"``.
        start_epoch: Number of epochs to train before the first prune, at least 0.
        every_n_epochs: Number of epochs from one prune to the next, at least 1.
        steps: Number of prunes; the cost goes down by the same amount at each.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        ignore: Patterns of module names (``"network.layer1.*"``) whose channels stay whole.
        module: Dotted name of the part to prune; default the whole LightningModule.
        example_inputs: What the ``forward`` of that part takes: a tensor, a tuple, a dictionary, or in YAML the shape
            of one tensor as a list of numbers. Default: ``example_input_array`` of the LightningModule, else the first
            training batch.

    Raises:
        ValueError: If a setting is out of range; when training starts also if the budget cannot be reached, the
            schedule does not fit into the run, a pattern matches nothing or no example input is to be had.

    Example:
        >>> callback = PruningCallback(keep=0.5, steps=3, start_epoch=2)
        >>> [callback.keep_after(step) for step in range(4)]
        [1.0, 0.8333333333333334, 0.6666666666666667, 0.5]
    """

    def __init__(
        self,
        keep: float = 0.5,
        metric: str = "flops",
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        steps: int = 1,
        round_to: int = 8,
        min_channels: int = 1,
        ignore: Sequence[str] = (),
        module: str = "",
        example_inputs: Any = None,
    ) -> None:
        allocation.check_keep(keep)
        check_metric(metric)
        for name, value, least in (
            ("start_epoch", start_epoch, 0),
            ("every_n_epochs", every_n_epochs, 1),
            ("steps", steps, 1),
            ("round_to", round_to, 1),
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
        self.steps_done = 0
        self.before: Measurement | None = None
        self.batch_like: dict[str, Any] | None = None
        self._graph: ChannelGraph | None = None
        self._part: trainer_state.Part | None = None
        self._epoch: int | None = None  # the epoch that has begun
        self._after: Measurement | None = None

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        """Rank the channels; called at each prune, with the same result on every rank.

        Args:
            trainer: The trainer.
            graph: The traced model; ``graph.model`` is the LightningModule.

        Returns:
            (channels,) score of each group, higher is kept; ``-inf`` for channels that have been removed.
        """
        return magnitude(graph)

    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        """Make the plan for one prune; by default all channels compete for the budget.

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
        if stage == "fit":
            self._refuse_short_run(trainer)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        check(pl_module, trainer.optimizers)
        if plan_in_force(pl_module) is None:  # a callback that has pruned another module starts anew
            self.steps_done, self.before = 0, None
        inputs = trainer_state.example_inputs(trainer, pl_module, self.module, self.example_inputs, self.batch_like)
        if self.example_inputs is None and pl_module.example_input_array is None:
            # A resumed run must not look at a batch again: loaders that know their position would lose it.
            self.batch_like = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        self._graph = trace(pl_module, inputs, module=self.module, ignore=self.ignore)
        least = allocation.reachable(self._graph, self.metric, self.round_to, self.min_channels)
        if not self._graph.groups:
            reasons = "; ".join(held.reason for held in self._graph.held.values())
            raise ValueError(f"{type(self).__name__} finds nothing to prune: {reasons or 'no layer makes channels'}.")
        if least > self.keep:
            raise ValueError(
                f"keep={self.keep} of the {self.metric} cannot be reached: between {least:.3f} and 1 can stay with "
                f"round_to={self.round_to} and min_channels={self.min_channels}. Raise keep, or lower round_to."
            )
        self._part = trainer_state.Part(pl_module, self.module, inputs)
        if self.before is None and trainer.is_global_zero:
            self.before = self._part.measure(self._graph)

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
            self._prune(trainer, pl_module, due)
        for metric, fraction in self._kept().items():
            pl_module.log(f"prune/keep_{metric}", fraction, on_step=False, on_epoch=True, rank_zero_only=True)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.before is not None and self.steps_done == 0 and not trainer.sanity_checking:
            self.before.metrics = trainer_state.metrics(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._warn_if_short(trainer)
        # Later hooks find the module on the CPU again, whatever it was trained on.
        if self.steps_done and self.before and self._graph and self._part and trainer.is_global_zero:
            self._after = self._part.measure(self._graph, trainer_state.metrics(trainer))

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        places = whereabouts(trainer)  # asks all ranks
        if self.before and self._after:
            rank_zero_info("\n".join(["", *summarize(self.before, self._after), "", *places]))

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._let_go()

    # -- checkpoint ------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    @override
    def state_dict(self) -> dict[str, Any]:
        before = None if self.before is None else self.before.to_json()
        return {"steps_done": self.steps_done, "before": before, "batch_like": self.batch_like}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_done, self.batch_like = state_dict["steps_done"], state_dict["batch_like"]
        self.before = Measurement.from_json(state_dict["before"]) if state_dict["before"] else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to modules out of copies and pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "log"} | {"_graph": None, "_part": None}

    def _begin_once(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._epoch != trainer.current_epoch:
            self._epoch = trainer.current_epoch
            self.begin_epoch(trainer, pl_module)

    # -- one prune -------------------------------------------------------------------------------------------------

    def _prune(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        assert self._graph is not None
        scores = self.scores(trainer, self._graph)
        plan = trainer_state.agree(trainer, self.allocate(self._graph, scores, self.keep_after(step)))
        report = prune(pl_module, plan, trainer.optimizers)
        trainer_state.rewrap(trainer)
        self.steps_done = step
        if not report.widths:
            rank_zero_warn(
                f"Prune {step} of {self.steps} removed nothing: the next smaller network in steps of "
                f"round_to={self.round_to} is below the budget. Lower round_to, or take fewer steps."
            )
        rank_zero_info(f"{self._headline(trainer, plan, step)}\n{report}")
        log_prune(trainer, self._graph, plan, scores)

    def _headline(self, trainer: "pl.Trainer", plan: PruningPlan, step: int) -> str:
        budget = plan.budget or {}
        told = ", ".join(f"{budget[name]:.3f} {name}" for name in ("asked", "rounded", "achieved") if name in budget)
        return f"Prune {step} of {self.steps} before epoch {trainer.current_epoch}: {self.metric} {told}"

    def _kept(self) -> dict[str, float]:
        assert self._graph is not None
        plan = plan_in_force(self._graph.model)
        widths = plan.widths if plan is not None else {}
        models = [CostModel(self._graph, metric) for metric in ("flops", "params", "channels")]
        return {cost.metric: cost(widths) / cost.original for cost in models}

    def _warn_if_short(self, trainer: "pl.Trainer") -> None:
        kept = self._kept()[self.metric]
        if getattr(trainer, "fast_dev_run", False) or (self.steps_done >= self.steps and kept <= self.keep):
            return
        rank_zero_warn(
            f"Training has ended with {kept:.3f} of the {self.metric} where keep={self.keep} was asked for, after "
            f"{self.steps_done} of {self.steps} prunes: prunes happen before epochs {self.start_epoch} to "
            f"{self.last_prune_epoch} (counted from 0), once each."
        )

    def _refuse_short_run(self, trainer: "pl.Trainer") -> None:
        epochs = trainer.max_epochs
        if getattr(trainer, "fast_dev_run", False) or epochs is None or epochs < 0 or self.last_prune_epoch < epochs:
            return
        raise ValueError(
            f"{type(self).__name__} prunes before epochs {self.start_epoch} to {self.last_prune_epoch} (counted from "
            f"0), but the run ends after {epochs} epochs; raise max_epochs to at least {self.last_prune_epoch + 1}, or "
            "lower start_epoch, steps or every_n_epochs."
        )

    def _let_go(self) -> None:
        """Drop every reference to modules."""
        self._graph = self._part = self._epoch = self._after = None
        self.__dict__.pop("log", None)  # Lightning gives every callback the module's bound method
