"""Stopping by accuracy: small prunes go on while a metric stays within a drop, and the last one too many is taken back.

What the metric may not fall below is its value at the last validation before the first prune. After each prune the
network trains for ``every_n_epochs`` epochs; the last validation of these says whether it is within the drop. If it
is, a snapshot is taken and the next prune comes; if not, the network goes back to the last snapshot and no more is
pruned. At the end of training the same is asked once more, so that what a run ends with is within the drop.
"""

import math
import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_prune import planning
from lightning_prune.callbacks.monitors import start_anew
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.runtimes import planned_metric
from lightning_prune.callbacks.schedule import pruning_callbacks
from lightning_prune.callbacks.surgery_step import go_back_in_training, snapshot_in_training
from lightning_prune.callbacks.trainer_state import unlogged
from lightning_prune.callbacks.trial_run import never_validates
from lightning_prune.callbacks.validating import Validator
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.loggers import say, warn
from lightning_prune.surgery import uninterrupted

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["check_settings", "check_start", "end", "judge", "may_prune", "next_step", "note_validation", "step_to_come"]

_ROUNDING = 1e-6  # of metrics, which are means of 32 bits
_REMEDY = "give max_drop with monitor, such as max_drop=0.01, monitor='val/accuracy'"


# -- settings ----------------------------------------------------------------------------------------------------------


def check_settings(callback: "PruningCallback") -> None:
    """Raise a ValueError unless the settings say in one way how far to prune; called by the constructor."""
    name = type(callback).__name__
    if callback.max_drop is None:
        if callback.keep is None or isinstance(callback.keep, list | tuple):
            raise ValueError(f"keep={callback.keep!r} does not say how far to prune: give one number, or {_REMEDY}.")
        planning.check_keep(callback.keep)
        if callback.monitor is not None:
            raise ValueError(f"monitor={callback.monitor!r} says when to stop only with max_drop; {_REMEDY}.")
        return
    if not callback.can_stop:
        raise ValueError(f"{name} chooses one network for one budget and knows no max_drop; use PruningCallback.")
    if isinstance(callback.max_drop, bool) or not _is_number(callback.max_drop) or callback.max_drop < 0:
        raise ValueError(f"max_drop must be a number of at least 0, in units of monitor; got {callback.max_drop!r}.")
    if callback.mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', as for ModelCheckpoint; got {callback.mode!r}.")
    if not _is_number(callback.step_keep) or not 0 < callback.step_keep < 1:
        raise ValueError(f"step_keep must be what a prune keeps, above 0 and below 1; got {callback.step_keep!r}.")
    if callback.steps != 1:
        raise ValueError(f"steps={callback.steps!r} and max_drop both say how many prunes there are; leave steps out.")
    if callback.start_epoch < 1:
        raise ValueError("start_epoch must be at least 1: max_drop is about the metric before the first prune.")
    _check_range(callback.keep)


def _check_range(keep: Any) -> None:
    """Raise a ValueError unless the fractions that bound the prunes are in order."""
    if keep is None:
        return
    several = keep if isinstance(keep, list | tuple) else [keep]
    if len(several) not in (1, 2):
        raise ValueError(f"keep must be one fraction, or the least and the greatest that may be kept; got {keep!r}.")
    for fraction in several:
        planning.check_keep(fraction)
    if several[0] > several[-1]:
        raise ValueError(f"keep must name the lesser fraction first; got {keep!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_start(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Raise a ValueError where stopping by accuracy cannot work; called when training is set up."""
    if callback.max_drop is None:
        return
    name = type(callback).__name__
    if callback.monitor is None:
        raise ValueError(f"{name} has max_drop={callback.max_drop!r} and no monitor to go by; {_REMEDY}.")
    if never_validates(trainer):
        raise ValueError(
            f"{name} goes by {callback.monitor!r}, which no validation measures: give the run a validation_step, "
            "validation data and limit_val_batches above 0."
        )
    if len(pruning_callbacks(trainer)) > 1:
        raise ValueError(
            f"{name} with max_drop goes back to what the whole network was, so that no other callback can prune beside "
            "it; use one pruning callback."
        )


# -- while it trains ---------------------------------------------------------------------------------------------------


def note_validation(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Note the monitored metric; called at the end of each validation of a run, on all ranks."""
    found, monitor = trainer.callback_metrics, str(callback.monitor)
    if monitor not in found:
        names = ", ".join(map(repr, sorted(found))) or "nothing"
        raise ValueError(f"monitor={monitor!r} is not among what validation logs: {names}.")
    if trainer.sanity_checking:
        return
    stop = callback.state.stop
    stop.value = decided_by_first_rank(trainer, lambda: float(found[monitor]))
    stop.measured = trainer.current_epoch + 1


def next_step(callback: "PruningCallback", epoch: int) -> int:
    """Return the number of the prune that comes before an epoch, or of the last one if none does."""
    stop = callback.state.stop
    first = callback.start_epoch if stop.pruned < 0 else stop.pruned + callback.every_n_epochs
    if epoch < first or not _can_recover(callback, epoch):
        return callback.steps_done
    return step_to_come(callback)


def step_to_come(callback: "PruningCallback") -> int:
    """Return the number of the next prune whenever it comes, or of the last one if none does."""
    stop, done = callback.state.stop, callback.steps_done
    if stop.over:
        return done
    steps = range(done + 1, callback.most_steps + 1)  # some of which rounding has made already
    return next((step for step in steps if callback.keep_after(step) < stop.achieved), done)


def _can_recover(callback: "PruningCallback", epoch: int) -> bool:
    """Tell whether the run goes on long enough for a network that is pruned before an epoch."""
    if "run" not in vars(callback):
        return True
    epochs = callback.run.trainer.max_epochs
    return epochs is None or epochs < 0 or epoch + callback.every_n_epochs <= epochs


def may_prune(callback: "PruningCallback") -> bool:
    """Tell whether the next prune can be made: the metric after the last one, or before the first, is known."""
    stop = callback.state.stop
    return not stop.over and stop.reference is not None and stop.judged == callback.steps_done


def judge(trainer: "pl.Trainer", callback: "PruningCallback", epoch: int) -> None:
    """Judge the last prune before an epoch, if it has been recovered from; called on all ranks."""
    stop = callback.state.stop
    if stop.over or epoch < callback.start_epoch:
        return
    _make_up_for_a_validation(trainer, callback, epoch)
    if stop.value is None:
        return
    if stop.reference is None:
        plan = plan_in_force(trainer.lightning_module)
        if plan is not None and plan.budget:  # of a run that was none that stops by accuracy
            stop.achieved = plan.budget.get("achieved", 1.0)
        stop.reference = stop.value
        _take_snapshot(trainer, callback)
    elif stop.judged < callback.steps_done and _has_recovered(callback):
        _settle(trainer, callback)
    if not stop.over and may_prune(callback):
        _see_whether_there_is_more(trainer, callback)


def _make_up_for_a_validation(trainer: "pl.Trainer", callback: "PruningCallback", epoch: int) -> None:
    """Validate now, if a run goes on from a file of between the last step of an epoch and its validation.

    Lightning leaves that validation out.
    """
    stop, every = callback.state.stop, trainer.check_val_every_n_epoch
    if stop.measured >= epoch or every is None or epoch % every:
        return
    found = Validator(trainer, sys.maxsize).now()
    if callback.monitor in found:
        stop.value = found[callback.monitor]
        stop.measured = epoch


def _settle(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Go on from the last prune, or take it back."""
    stop = callback.state.stop
    if _is_within(callback):
        stop.judged = callback.steps_done
        say(f"Prune {callback.steps_done} stays: {_told(callback)}.")
        _take_snapshot(trainer, callback)
    else:
        _go_back(trainer, callback, _told(callback))


def end(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """See to it that the run ends with a network that is within the drop; called on all ranks."""
    stop = callback.state.stop
    if stop.reference is None:  # nothing was validated, as in a try-out
        return
    if callback.steps_done == 0:
        if plan_in_force(trainer.lightning_module) is None:
            warn(f"{type(callback).__name__} could prune nothing with {callback.monitor} within max_drop; raise that.")
        stop.snapshot = {}
        return
    if stop.judged < callback.steps_done and not _has_recovered(callback):
        _go_back(trainer, callback, f"the run has ended before {callback.monitor} was validated after it")
    elif not _is_within(callback):
        _go_back(trainer, callback, _told(callback))
    else:
        stop.judged = callback.steps_done
        say(f"Pruning has stopped at {stop.achieved:.3f} of the {callback.metric}: {_told(callback)}.")
    stop.snapshot = {}


def _see_whether_there_is_more(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Stop for good where the next smaller network is out of reach."""
    step = step_to_come(callback)
    if step == callback.steps_done:
        return
    limits = callback.round_to, callback.min_channels, callback.cap
    keep = callback.keep_after(step)

    def refusal() -> str:
        try:
            planning.check_reachable(callback.run.graph, keep, planned_metric(callback), *limits)
        except ValueError as raised:
            return str(raised)
        return ""

    why = decided_by_first_rank(trainer, refusal)
    if why:
        callback.state.stop.over = True
        say(f"No more is pruned: {why}")


def _has_recovered(callback: "PruningCallback") -> bool:
    stop = callback.state.stop
    return stop.measured >= stop.pruned + callback.every_n_epochs


def _is_within(callback: "PruningCallback") -> bool:
    stop = callback.state.stop
    reference, value, most = stop.reference, stop.value, callback.max_drop
    if reference is None or value is None or most is None:
        return False
    drop = reference - value if callback.mode == "max" else value - reference
    return drop <= most + _ROUNDING * max(1.0, abs(reference))  # which of NaN is not so


def _told(callback: "PruningCallback") -> str:
    stop = callback.state.stop
    within = "within" if _is_within(callback) else "not within"
    numbers = f"{stop.value:.4f} after {stop.reference:.4f} before the first prune"
    return f"{callback.monitor} is {numbers}, {within} max_drop={callback.max_drop}"


# -- going back --------------------------------------------------------------------------------------------------------


def _take_snapshot(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    stop = callback.state.stop
    network = snapshot_in_training(trainer, callback.find_followers())
    stop.snapshot = {"steps_done": callback.steps_done, "achieved": stop.achieved, "network": network}


def _go_back(trainer: "pl.Trainer", callback: "PruningCallback", why: str) -> None:
    """Go back to the last network that was within the drop, and prune no more."""
    stop, state = callback.state.stop, callback.state
    asked_for = callback.steps_done == 1 and callback.bounds[1] < 1  # whatever it costs
    if asked_for or not stop.snapshot:
        if not stop.over:
            warn(f"{type(callback).__name__} prunes no further, and keeps what keep={callback.keep!r} asks for: {why}.")
        stop.over = True
        stop.judged = callback.steps_done
        return
    with uninterrupted(), unlogged(trainer.lightning_module):
        plan = go_back_in_training(trainer, stop.snapshot["network"], callback.find_followers())
        taken_back = callback.steps_done
        state.steps_done = stop.judged = stop.snapshot["steps_done"]
        stop.achieved = stop.snapshot["achieved"]
        stop.over = True
        if callback.reset_monitors:
            start_anew(trainer, budget_is_met=True)
        callback.run.untried = []
        callback.run.recorder.take_back(plan, state.steps_done)
    if taken_back > state.steps_done:
        what = f"Prune {taken_back} is taken back"
    else:
        what = "The network goes back to what it was right after that was measured last"
    say(f"{what}: {why}. It keeps {stop.achieved:.3f} of the {callback.metric} from now on, and no more is pruned.")
