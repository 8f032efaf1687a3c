"""The base of all pruning callbacks: what a subclass says, and the hooks that prune by it while a network trains."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed, nn, tensor
from typing_extensions import override

from lightning_prune import criteria, planning
from lightning_prune.callbacks import refusals, stopping
from lightning_prune.callbacks.bars import follow
from lightning_prune.callbacks.compensation_step import compensations
from lightning_prune.callbacks.descriptions import described
from lightning_prune.callbacks.distilling import Distill, Distiller, distill_settings, logits_of, weights_now
from lightning_prune.callbacks.example_inputs import example_inputs as find_example_inputs
from lightning_prune.callbacks.extensions import extend_lightning
from lightning_prune.callbacks.followers import Candidate, Following, followers, following
from lightning_prune.callbacks.interrupting import tell_how_to_resume
from lightning_prune.callbacks.monitors import start_anew, tell_of_unlogged
from lightning_prune.callbacks.plan_checkpoint_io import carry_plans
from lightning_prune.callbacks.prune_batches import PruneBatches, arguments_of
from lightning_prune.callbacks.ranks import agreed_plan, decided_by_first_rank
from lightning_prune.callbacks.recording import Recorder
from lightning_prune.callbacks.rehearsal import Rehearsal
from lightning_prune.callbacks.relatives import frozen_parts, relations_in, tell_of_relations
from lightning_prune.callbacks.result import found_result, interrupted_result, named_result, try_result
from lightning_prune.callbacks.resuming import tell_of_other_callbacks, tell_what_holds
from lightning_prune.callbacks.run import Run as BaseRun
from lightning_prune.callbacks.runtimes import check_runtime, planned_metric, prepare_runtime
from lightning_prune.callbacks.schedule import Schedule, check_whole_number
from lightning_prune.callbacks.settings import refuse_other_settings
from lightning_prune.callbacks.state import State as BaseState
from lightning_prune.callbacks.state import deal_out, from_checkpoint, gather, to_checkpoint
from lightning_prune.callbacks.surgery_step import prune_in_training
from lightning_prune.callbacks.trainer_state import is_fitting, log_mean, unlogged
from lightning_prune.callbacks.trial_run import is_trial
from lightning_prune.callbacks.validating import Validator
from lightning_prune.criteria.channel_scores import refuse_blocks
from lightning_prune.criteria.registry import find, needs_data, needs_loss, scores_blocks, takes_data
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.nested import first_length
from lightning_prune.progress import progress, show_with
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.reporting.history import History
from lightning_prune.reporting.loggers import folder, say, warn, without_placeholder
from lightning_prune.surgery import check, uninterrupted
from lightning_prune.surgery.compensation import METHODS, Compensation
from lightning_prune.surgery.pruning import Follower
from lightning_prune.unlabelled import run_forward

__all__ = ["PruningCallback"]

_BEST = "refit"  # what compensates if it is left open


class PruningCallback(Schedule, Callback):
    """Prune a network step by step while it trains, and let the channels that are kept make up for those pruned.

    At the start of every ``every_n_epochs``-th epoch, from ``start_epoch`` on, the channels that matter least are
    pruned for good, until after ``steps`` prunes the budget is met. Scores and compensation look at some training
    batches without their labels; where there are none, or the module cannot be run on them, a warning says so, and
    channels are ranked by the weights alone. Training then goes on: optimizers keep their state,
    distributed training is wrapped anew, and checkpoints hold the plan, so that a run resumes in the pruned shape. With
    ``fast_dev_run`` the network is pruned down to the budget before the last training batch, or after the only one, to
    show that all of it works.

    A subclass says how to prune, in `make_plan` or in `scores` and `allocate`, and declares in ``State`` what has to
    survive a checkpoint and in ``Run`` what exists while it trains; see the guide "Write your own callback".

    Args:
        keep: Fraction of the original cost that is kept in the end, in (0, 1]; default 0.5. With ``max_drop`` the least
            fraction that may be kept, or a list of the least and the greatest, or nothing.
        metric: What the fraction is of: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"``: the time of a
            forward pass of the example inputs in evaluation mode, measured on the device of the first rank.
        start_epoch: Number of epochs to train before the first prune, at least 0.
        every_n_epochs: Number of epochs from one prune to the next, at least 1.
        steps: Number of prunes; the cost goes down by the same amount at each.
        round_to: Layers that are pruned keep a multiple of this many channels; for latency also ``"auto"``, the
            multiple that keeps most on this device.
        min_channels: Least number of channels of a group.
        ignore: Patterns of module names (``"network.layer1.*"``) whose channels are not pruned.
        module: Dotted name of the submodule to prune; default the LightningModule itself.
        example_inputs: What the ``forward`` of that module takes: a tensor, a tuple, a dictionary, or in YAML the shape
            of one tensor as a list of numbers. Default: ``example_input_array`` of the LightningModule, else what
            ``training_step`` or ``validation_step`` hands to it.
        criterion: What scores the channels: a name in ``lightning_prune.criteria.CRITERIA`` or the import path of a
            function, with settings as a mapping such as ``{"name": "magnitude", "p": 2}``; one that needs no labels.
        compensate: What makes up for each prune before training goes on: ``"none"``, ``"statistics"``, ``"fold"`` or
            ``"refit"``, see `lightning_prune.prune`; or ``"auto"``: the last of these where the module can be run on
            training batches, else the first.
        compensate_batches: Number of training batches that scores and compensation look at, without their labels, each
            of as many samples as all ranks take in a step, at most 128.
        distill: Whether the network as it was before the first prune teaches what is left of it, from that prune on:
            true, false, or settings as a mapping such as ``{"temperature": 4, "share": 0.9}``.
        validate_batches: Number of validation batches on which the module's own validation is run right before and
            right after each prune, and at the end, to tell what the prune has cost; 0 for none.
        reset_monitors: Whether `EarlyStopping` and `ReduceLROnPlateau` count anew from each prune, and
            `ModelCheckpoint` chooses its best anew from the last prune: a score of before is one of another network.
        save_result: Whether a run ends with a file that has the plan in force and the weights in memory; where no
            `ModelCheckpoint` has written one, it is ``pruned.ckpt`` in the folder of the checkpoints.
        ranking: With which others a channel is compared: ``"global"`` for those of all groups, or ``"isomorphic"`` for
            those of the groups that are built alike, see `lightning_prune.plan`.
        max_drop: How far ``monitor`` may drop from its value before the first prune, at least 0, in its own units.
            Small prunes then follow each other while it stays within that after the ``every_n_epochs`` epochs that
            follow each; the one too many is taken back: weights, optimizers, averages and plan are those of before.
        monitor: Name of a metric that validation logs, such as ``"val/accuracy"``.
        mode: ``"max"`` if much of that metric is good, ``"min"`` if little is.
        step_keep: What each of these prunes keeps of the cost that there was before it, in (0, 1).
        blocks: Whether residual blocks are pruned too, each with all that it runs: where ``x + f(x)`` is computed,
            ``f`` is pruned, and is worth what its channels are on average; for criteria whose scores of different
            layers can be compared, and callbacks that plan by scores.
        runtime: What the time of ``metric="latency"`` is that of: ``"torch"``, or ``"onnxruntime"`` on this machine, or
            the path of a table (``"table.json"``) that ``lightning-prune profile`` has printed on the machine that the
            network is for.

    Raises:
        ValueError: If a setting is out of range; when training starts also if the budget cannot be reached, the
            schedule does not fit into the run, a pattern matches nothing or no example input is to be had.

    Attributes:
        state: What has to survive a checkpoint.
        run: What refers to the module, the graph and the trainer; it exists from the start to the end of training.
        result_path: The file with the plan in force and the weights in memory, once a run has ended; "" if there is
            none.

    Example:
        >>> callback = PruningCallback(keep=0.5, steps=3, start_epoch=2)
        >>> [callback.keep_after(step) for step in range(4)]
        [1.0, 0.8333333333333334, 0.6666666666666667, 0.5]
    """

    State: TypeAlias = BaseState
    Run: TypeAlias = BaseRun
    cap: ClassVar[float] = 1.0  # greatest fraction of its channels that a group may lose
    rankings: ClassVar[Sequence[str]] = planning.RANKINGS  # what ``ranking`` may be
    can_stop: ClassVar[bool] = True  # whether its prunes can go on as long as a metric allows

    state: BaseState
    run: BaseRun

    def __init__(
        self,
        keep: float | list[float] | None = None,
        metric: str = "flops",
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        steps: int = 1,
        round_to: int | str = 8,
        min_channels: int = 1,
        ignore: Sequence[str] = (),
        module: str = "",
        example_inputs: Any = None,
        criterion: str | dict[str, Any] = "coherent_obs",
        compensate: str = "auto",
        compensate_batches: int = 8,
        distill: bool | dict[str, Any] = False,
        validate_batches: int = 16,
        reset_monitors: bool = True,
        save_result: bool = True,
        ranking: str = "global",
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: str = "max",
        step_keep: float = 0.9,
        runtime: str = "torch",
        blocks: bool = False,
    ) -> None:
        planning.metric_named(metric).roundings(round_to)  # refuses what it does not know
        check_whole_number("start_epoch", start_epoch, 0)
        check_whole_number("every_n_epochs", every_n_epochs, 1)
        check_whole_number("steps", steps, 1)
        check_whole_number("min_channels", min_channels, 1)
        check_whole_number("compensate_batches", compensate_batches, 1)
        _check_compensate(compensate)
        check_whole_number("validate_batches", validate_batches, 0)
        distill_settings(distill)  # refuses what it does not know
        self._check_ranking(ranking)
        self.blocks = self.checked_blocks(blocks, criterion)
        self.keep = 0.5 if keep is None and max_drop is None else keep
        self.max_drop = max_drop
        self.monitor = monitor
        self.mode = mode
        self.step_keep = step_keep
        check_runtime(runtime, metric)
        self.runtime = runtime
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
        self.compensate = compensate
        self.compensate_batches = compensate_batches
        self.validate_batches = validate_batches
        self.distill = dict(distill) if isinstance(distill, Mapping) else distill
        self.reset_monitors = reset_monitors
        self.save_result = save_result
        self.ranking = ranking
        self.result_path = ""
        stopping.check_settings(self)
        self.check_criterion()
        self.state = self.State()
        self._last_module: ref[pl.LightningModule] | None = None

    @property
    def steps_done(self) -> int:
        """Number of prunes so far."""
        return self.state.steps_done

    @property
    def is_complete(self) -> bool:
        """Whether no prune is to come."""
        if self.max_drop is not None:
            return stopping.step_to_come(self) == self.steps_done
        return self.steps_done >= self.steps

    @override
    def steps_due(self, epoch: int) -> int:
        return super().steps_due(epoch) if self.max_drop is None else stopping.next_step(self, epoch)

    @property
    def history(self) -> History | None:
        """What became of the network; on the first rank, once training has started."""
        return self.state.history

    # -- what a subclass may say -----------------------------------------------------------------------------------

    def make_plan(
        self, trainer: "pl.Trainer", graph: ChannelGraph, keep: float
    ) -> tuple[PruningPlan, dict[str, Tensor]]:
        """Say what is kept at a prune; called on every rank, and the plan of the first one is what is pruned by.

        By default the first rank makes the plan, by `allocate` from what `scores` returns.

        Args:
            trainer: The trainer.
            graph: The traced model; ``graph.model`` is the LightningModule.
            keep: Fraction of the original cost that may be kept.

        Returns:
            The plan, and the (channels,) score of each group, which is logged.
        """
        scores = self.scores(trainer, graph)
        plan = agreed_plan(trainer, partial(self.allocate, graph, scores, keep))
        return plan, scores

    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        """Score the channels; called at each prune, with the same result on every rank.

        Args:
            trainer: The trainer.
            graph: The traced model; ``graph.model`` is the LightningModule.

        Returns:
            (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.
        """
        if not (self._takes_batches and self.run.batches.serve):
            return criteria.score(graph, self.criterion)
        batches, run = self.run.batches.of_prune(self.run.step), self.run.batches.run_on
        # The first rank alone: no two machines need to add up in the same order.
        return decided_by_first_rank(trainer, lambda: criteria.score(graph, self.criterion, batches, run))

    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        """Make the plan for one prune, on the first rank; by default all channels compete as ``ranking`` says.

        Args:
            graph: The traced model.
            scores: What `scores` returned.
            keep: Fraction of the original cost that may be kept.
        """
        limits = self.round_to, self.min_channels
        return planning.plan(graph, scores, keep, planned_metric(self), *limits, ranking=self.ranking)

    def run_on_batch(self, model: nn.Module, batch: Any) -> Any:
        """Run the LightningModule on a training batch without its labels, for scores and compensation.

        By default ``forward`` is what runs.

        Args:
            model: A copy of the LightningModule, or of an average of it, in evaluation mode.
            batch: A batch as ``training_step`` gets it. Of a list or tuple, the first entry is taken, or as many as
                there are example inputs; of a dictionary, what ``forward`` has a name for.
        """
        whole = self.run.graph.example_inputs if not self.module else ()
        return run_forward(model, batch, arguments_of(whole))

    def distillation_loss(self, output: Any, expected: Any) -> Tensor:
        """Tell how far the network is from its teacher, for ``distill``; by default by their logits.

        Args:
            output: What the network has returned in a training step.
            expected: What its teacher returns for the same inputs, in evaluation mode, without gradients.

        Returns:
            A single number, at least 0.

        Raises:
            ValueError: If outputs of this kind cannot be compared.
        """
        settings = distill_settings(self.distill) or Distill()
        return settings.divergence(logits_of(output, settings.axis), logits_of(expected, settings.axis))

    def check_criterion(self) -> None:
        """Raise a ValueError unless `scores` can be worked out by the criterion; called by the constructor."""
        if needs_loss(find(self.criterion)):
            raise ValueError(
                f"Criterion {self.criterion!r} needs a loss, and {type(self).__name__} scores without labels; use "
                "TaylorRankCallback, or score with lightning_prune.criteria.score."
            )

    def _check_ranking(self, ranking: str) -> None:
        """Raise a ValueError unless the callback compares channels in this way."""
        if planning.check_ranking(ranking) not in self.rankings:
            raise ValueError(
                f"{type(self).__name__} decides by a method of its own how much each layer gives, so that "
                f"ranking={ranking!r} has no meaning for it; leave it out, or use PruningCallback."
            )

    def checked_blocks(self, blocks: bool, criterion: str | dict[str, Any]) -> bool:
        """Return whether residual blocks are pruned; raise a ValueError if they are to be, and nothing scores them."""
        if not blocks:
            return False
        if self.rankings != planning.RANKINGS:
            raise ValueError(
                f"{type(self).__name__} decides by a method of its own how much each layer gives, which says nothing "
                "of blocks; leave blocks out, or use PruningCallback."
            )
        if not scores_blocks(criterion):
            refuse_blocks(f"criterion={criterion!r}")
        return True

    def check_budget(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        """Raise a ValueError if the budget cannot be reached; called when training starts."""
        limits = self.round_to, self.min_channels, self.cap
        with progress(f"Measuring the {self.metric} of {type(graph.model).__name__}"):
            keep = self.keep_after(1 if self.max_drop is not None else self.steps)
            decided_by_first_rank(trainer, lambda: planning.check_reachable(graph, keep, planned_metric(self), *limits))

    def prepare(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        """Set up what the run needs, and refuse what cannot work; called when training starts."""

    def begin_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Do what an epoch starts with, after the prune if one is due; called once for each epoch of a run."""

    def ready(self) -> bool:
        """Tell whether all that a plan is made from is there; a prune that is due waits for it."""
        return True

    # -- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        refusals.refuse_strategy(trainer)
        extend_lightning()  # what was imported since
        if stage == "fit":  # before anything that a rank alone may refuse, while others wait for it
            refuse_other_settings(trainer, self)
        refusals.refuse_other_callbacks(trainer, self)
        carry_plans(trainer)
        follow(trainer)
        if stage != "fit":
            return
        refusals.refuse_short_run(trainer, self)
        stopping.check_start(trainer, self)
        without_placeholder(trainer)
        same_module = self._last_module is not None and self._last_module() is pl_module
        if not same_module or plan_in_force(pl_module) is None:
            self.state = self.State()  # before the state of a run that is resumed is loaded
        self.state.stop.begin_again()
        self._last_module = ref(pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        refusals.refuse_few_steps(trainer, self)
        with unlogged(pl_module):
            graph = self._trace(trainer, pl_module)
            prepare_runtime(trainer, self, graph)
            if not self.is_complete:
                self.check_budget(trainer, graph)
            recorder = Recorder(trainer, graph, self.history)
            tell_what_holds(self, recorder)
            recorder.begin(self)
            self.state.history = recorder.history
            batches = PruneBatches(trainer, self.compensate_batches, self.run_on_batch)
            self.run = self.Run(trainer, graph, recorder, Validator(trainer, self.validate_batches), batches)
            if not self.is_complete:
                self._try_batches()
            self._begin_distillation()
            self.prepare(trainer, graph)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._begin_epoch_once(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        # A run that resumes in the middle of an epoch, or right after its last batch, starts without the hook above.
        self._begin_epoch_once(trainer, pl_module)
        if self.run.distiller is not None:
            self.run.distiller.begin_step()

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        joined = self.run.distiller.join(loss) if self.run.distiller is not None else None
        if joined is not None:
            log_mean(pl_module, f"{folder(self.module)}/distillation", *joined)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.run.untried = []
        if self.run.distiller is not None:
            self.run.distiller.end_step()
        # A run of a few batches that is to show whether all works, the prune and what comes after it among that.
        is_second_to_last = batch_idx + 1 == max(1, trainer.num_training_batches - 1)
        if is_trial(trainer) and is_second_to_last and self.steps_done < self.steps and self.ready():
            self._prune(trainer, pl_module, self.steps)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.max_drop is not None and is_fitting(trainer):
            stopping.note_validation(trainer, self)
        if self._is_running:
            self.run.recorder.add_validation()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.max_drop is not None:
            stopping.end(trainer, self)
        else:
            self._warn_if_short()
        with unlogged(pl_module):
            metrics = self.run.validator.now() if self.steps_done else {}
            self.run.recorder.end(metrics)  # later hooks find the module on the CPU again, whatever it was trained on

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if is_trial(trainer):
            tell_of_unlogged(trainer)
        if self._is_running:  # a run that is resumed after its end does not train
            self.result_path = self._result(trainer, pl_module)
            self.run.recorder.tell(self.result_path)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._end_run()
        self.state.teacher = {}

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        untried = self.run.untried if self._is_running else []
        if untried and isinstance(exception, RuntimeError):
            warn(
                f"This was the first training step after channels of {', '.join(untried)} were pruned. Where "
                "training_step or a hook hands what is inside the network to a layer that forward does not run, that "
                "layer was not pruned: put the layer whose output it takes into ignore, or let forward run both."
            )
        if isinstance(exception, KeyboardInterrupt) and self._saves_result(trainer, pl_module):
            self.result_path = interrupted_result(trainer)
            if self.result_path:
                say(f"The network as it is now, pruned to where the run was interrupted: {self.result_path}")
        if isinstance(exception, KeyboardInterrupt) and self._is_running:
            tell_how_to_resume(trainer, self)
        self._end_run()

    # -- checkpoint of the state -----------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return to_checkpoint(self.state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = from_checkpoint(self.State, state_dict)

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        several = distributed.is_available() and distributed.is_initialized()
        if several and not trainer.interrupted:  # after a failure the other ranks may not be there to be asked
            gather(self.State, checkpoint["callbacks"][self.state_key])

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        tell_of_other_callbacks(trainer, self, checkpoint["callbacks"])
        content = checkpoint["callbacks"].get(self.state_key, {})
        deal_out(self.State, content, trainer.global_rank, trainer.world_size)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: nothing that refers to the module, which Lightning's ``log`` does."""
        without = ("run", "log")
        kept = {name: value for name, value in vars(self).items() if name not in without}
        return {**kept, "_last_module": None}

    # -- one run ---------------------------------------------------------------------------------------------------

    @property
    def _is_running(self) -> bool:
        return "run" in vars(self)

    @property
    def _takes_batches(self) -> bool:
        """Whether the criterion can be given batches without labels."""
        function = find(self.criterion)
        return takes_data(function) and not needs_loss(function)

    def _try_batches(self) -> None:
        """Try the module on a training batch, if scores or compensation look at some."""
        needing = []
        if self.compensate not in ("auto", "none"):
            needing.append(f"compensate={self.compensate!r}")
        if self._takes_batches and needs_data(find(self.criterion)):
            needing.append(f"criterion={self.criterion!r}")
        if needing or self._takes_batches or self.compensate == "auto":
            self.run.batches.try_out(needing, type(self).__name__, self.module)

    def _compensations(self, plan: PruningPlan, copies: Following) -> list[Compensation]:
        batches, method = self.run.batches, self.compensate
        if method == "auto":
            method = _BEST if batches.serve else "none"
        if method == "none":
            return []
        drawn = batches.of_prune(self.run.step)
        return compensations(self.run.trainer, plan, method, drawn, batches.run_on, copies.copies)

    def _trace(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> ChannelGraph:
        """Trace the model, and refuse what cannot be pruned."""
        check(pl_module, trainer.optimizers)
        # Steps as they are when a run begins: one that is resumed has to find the same groups.
        rehearsal = Rehearsal(trainer, pl_module, self.state.training_batch_like, epoch=0, global_step=0)
        copies = followers(rehearsal, frozen_parts(pl_module, self.module))
        graph = self._trace_steps(rehearsal, copies)
        tell_of_relations(graph, copies)
        refusals.refuse_averaged_models(pl_module, graph, copies)
        refusals.refuse_pruned_blocks(self, graph)
        if not graph.groups:
            reasons = "; ".join(dict.fromkeys(unprunable.reason for unprunable in graph.unprunable.values()))
            raise ValueError(f"{type(self).__name__} finds nothing to prune: {reasons or 'no layer makes channels'}.")
        return graph

    def _trace_steps(self, rehearsal: Rehearsal, copies: Sequence[Candidate]) -> ChannelGraph:
        """Trace the model with all that trains and measures it."""
        pl_module = rehearsal.pl_module
        inputs = find_example_inputs(rehearsal, self.module, self.example_inputs, self.state.batch_like)
        if self.example_inputs is None and (self.module or pl_module.example_input_array is None):
            # A resumed run must not look at a batch again: loaders that know their position would lose it.
            self.state.batch_like = described(inputs)
        relations = relations_in(rehearsal, self.module, copies)
        settings: dict[str, Any] = {"module": self.module, "ignore": self.ignore, "relations": relations}
        settings["blocks"] = self.blocks
        for steps in rehearsal.attempts(first_length(inputs) or 1):
            graph = trace(pl_module, inputs, steps=steps, **settings)
            if not graph.untraced:
                break
        self.state.training_batch_like = rehearsal.batch_like
        tell_of_steps = say if rehearsal.serves_as_it_likes else warn
        for name, why in graph.untraced.items():
            tell_of_steps(
                f"{name} of {type(pl_module).__name__} could not be traced ({why}): where it hands what is inside the "
                "network to a layer that forward does not run, put the layer whose output it takes into ignore."
            )
        return graph

    def _begin_epoch_once(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.run.epoch == trainer.current_epoch:
            return
        self.run.epoch = trainer.current_epoch
        # Checkpoints of an epoch are written before the next one starts, so each holds the network as it was trained
        # and a resumed run prunes from the same state as an unbroken one.
        if self.max_drop is not None:
            stopping.judge(trainer, self, trainer.current_epoch)
        due = self.steps_due(trainer.current_epoch)
        if due > self.steps_done and self.ready() and (self.max_drop is None or stopping.may_prune(self)):
            self._warn_if_several(due, trainer.current_epoch)
            self._prune(trainer, pl_module, due)
        for metric, fraction in self.run.recorder.kept.items():
            log_mean(pl_module, f"{folder(self.module)}/keep_{metric}", tensor(fraction), samples=1)  # all ranks alike
        if self.run.distiller is not None:
            self.run.distiller.begin_epoch()
        self.begin_epoch(trainer, pl_module)

    def _prune(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        self.run.step = step
        doing = f"Pruning {type(pl_module).__name__}, step {step} of {self.steps_told}"
        with unlogged(pl_module), progress(doing):
            made, scores = self.make_plan(trainer, self.run.graph, self.keep_after(step))
            plan = agreed_plan(trainer, lambda: made)
            rehearsal = Rehearsal(trainer, pl_module, self.state.training_batch_like)
            copies = following(rehearsal, frozen_parts(pl_module, self.module), plan)
            found = self._compensations(plan, copies)
            self.run.batches.forget()
            metrics = self.run.validator.around(plan, found)
            teacher = self._teacher_from_now()
        with uninterrupted(), unlogged(pl_module):  # a checkpoint that a signal asks for holds all of this, or nothing
            report = prune_in_training(trainer, plan, found, copies)
            self.state.steps_done = step
            self.state.teacher = teacher
            self.state.stop.pruned = trainer.current_epoch
            self.state.stop.achieved = (plan.budget or {}).get("achieved", self.keep_after(step))
            if self.reset_monitors:
                start_anew(trainer, budget_is_met=self.max_drop is not None or step == self.steps)
            self.run.untried = list(report.widths)
            self.run.recorder.add_prune(plan, step, report.compensation, metrics)
            self.run.recorder.tell_prune(scores)
        if not report.widths:
            warn(
                f"Prune {step} of {self.steps_told} has pruned nothing: the next smaller network in steps of "
                f"round_to={self.round_to} is below the budget. Lower round_to, or take fewer steps."
            )
        self._warn_if_narrow(plan, step)
        told = "\n".join([self._headline(trainer, plan, step), str(report), *metrics.lines])
        say(told)

    def find_followers(self) -> list[Follower]:
        """Return the copies of weights that are pruned with the module, which have to follow it."""
        trainer = self.run.trainer
        rehearsal = Rehearsal(trainer, trainer.lightning_module, self.state.training_batch_like)
        found = followers(rehearsal, frozen_parts(trainer.lightning_module, self.module))
        return [candidate.follower for candidate in found]

    def _begin_distillation(self) -> None:
        """Let the teacher of a run that goes on teach, and refuse what cannot be taught."""
        settings = distill_settings(self.distill)
        if settings is None:
            self.state.teacher = {}
            return
        run = self.run
        distiller = Distiller(run.trainer, run.graph, settings.share, self.distillation_loss)
        if self.state.teacher:
            distiller.teach_with(self.state.teacher)
        elif self.steps_done:
            warn(
                f"{type(self).__name__} goes on without distill: the network before the first prune, the teacher, is "
                "not at hand. It is dropped at the end of `fit`; checkpoints that are written while it trains have it."
            )
            return
        distiller.check()
        run.distiller = distiller

    def _teacher_from_now(self) -> dict[str, Tensor]:
        """Return the weights of the teacher; before the first prune let the network as it is now teach."""
        if self.run.distiller is None or self.state.teacher:
            return self.state.teacher
        weights = weights_now(self.run.trainer)
        self.run.distiller.teach_with(weights)
        return weights

    def _saves_result(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        pruned = self._is_running and plan_in_force(pl_module) is not None
        return pruned and self.save_result and not is_trial(trainer)

    def _result(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> str:
        """Return the path of a file with the result of the run, or ""."""
        if plan_in_force(pl_module) is None:
            return ""
        if is_trial(trainer):
            try_result(trainer)
            return ""
        others = [getattr(other, "result_path", "") for other in trainer.callbacks]  # type: ignore[attr-defined]
        if not self.save_result:
            return found_result(trainer, others)
        return named_result(trainer, others, budget_is_met=self.max_drop is not None or self.steps_done >= self.steps)

    def _end_run(self) -> None:
        """Drop every reference to the module."""
        if self._is_running:
            if self.run.distiller is not None:
                self.run.distiller.stop()
            self.run.end()
            del self.run
        show_with(None)
        vars(self).pop("log", None)  # Lightning gives every callback the module's bound method

    @property
    def steps_told(self) -> str:
        """The number of prunes, in words."""
        return f"at most {self.most_steps}" if self.max_drop is not None else str(self.steps)

    # -- messages --------------------------------------------------------------------------------------------------

    def _headline(self, trainer: "pl.Trainer", plan: PruningPlan, step: int) -> str:
        kept = planning.kept_of(plan.budget or {})
        told = f": {kept}" if kept else ""
        return f"Prune {step} of {self.steps_told} before epoch {trainer.current_epoch}{told}"

    def _warn_if_several(self, due: int, epoch: int) -> None:
        if due == self.steps_done + 1 or self.max_drop is not None:
            return
        warn(
            f"Prunes {self.steps_done + 1} to {due} of {self.steps} happen at once, before epoch {epoch}: the run goes "
            "on from a checkpoint without them. To spread them, raise start_epoch."
        )

    def _warn_if_narrow(self, plan: PruningPlan, step: int) -> None:
        narrow = planning.narrow_groups(self.run.graph, plan)
        if not narrow:
            return
        told = ", ".join(f"{name} {fraction:.1%}" for name, fraction in narrow.items())
        warn(
            f"Prune {step} of {self.steps_told} leaves hardly any channels of {told}, and far more of the others: all "
            "that comes behind has to do with these. Raise min_channels, or name another criterion."
        )

    def _warn_if_short(self) -> None:
        # Not what the plan in force says: another callback may have pruned another submodule after this one.
        prunes = self.history.prunes if self.history is not None else []
        kept = prunes[-1].budget.get("achieved", 1.0) if prunes else 1.0
        if self.steps_done >= self.steps and kept <= self.keep:
            return
        warn(
            f"Training has ended with {kept:.3f} of the {self.metric} where keep={self.keep} was asked for, "
            f"after {self.steps_done} of {self.steps} prunes: prunes happen before epochs {self.start_epoch} to "
            f"{self.last_prune_epoch} (counted from 0), once each."
        )


def _check_compensate(compensate: str) -> None:
    """Raise a ValueError unless a setting names what makes up for a prune."""
    if compensate not in ("auto", *METHODS):
        raise ValueError(f"compensate must be one of auto, {', '.join(METHODS)}; got {compensate!r}.")
