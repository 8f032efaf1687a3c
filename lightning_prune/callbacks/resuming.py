"""A run that goes on from a checkpoint with other settings: what holds, and what is said of it when it starts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_prune.callbacks.recording import Recorder
from lightning_prune.callbacks.settings import Changed, changed_settings, settings_of
from lightning_prune.callbacks.state import without_what_depends_on
from lightning_prune.callbacks.trainer_state import is_fitting
from lightning_prune.reporting.loggers import warn

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["tell_of_other_callbacks", "tell_what_holds"]


def tell_what_holds(callback: "PruningCallback", recorder: Recorder) -> None:
    """Say which settings hold in a run that is resumed with other ones, and see that they do.

    The new ones hold for all prunes that are still to come: what was learned under the former ones is forgotten. If
    none is to come, what the checkpoint holds is in force, whatever the new ones are.

    Args:
        callback: The callback, with the state of its checkpoint.
        recorder: What records its run.
    """
    changed = changed_settings(callback)
    if recorder.history is None:
        return
    if "distill" in changed:  # which is about all training, and not about the prunes to come
        before, after = changed.pop("distill")
        recorder.history.settings["distill"] = after
        warn(
            f"{type(callback).__name__} goes on with distill={after!r}, after {before!r} in the run of the checkpoint."
        )
    if not changed:
        return
    former, new = _told(changed, "before"), _told(changed, "after")
    if callback.state.stop.reference is not None and {"monitor", "mode"} & changed.keys():
        raise ValueError(
            f"{type(callback).__name__} goes on from a run with {former}, now with {new}: how far that has dropped "
            "since the first prune is not known; give the same monitor and mode, or start anew."
        )
    begin = f"{type(callback).__name__} goes on from a run with {former}, now with {new}: "
    kept = recorder.kept.get(callback.metric)
    now = f"the network keeps {kept:.3f} of the {callback.metric}" if kept is not None else "the network is pruned"
    if callback.is_complete:
        warn(
            f"{begin}that schedule is complete and {now}, so what the checkpoint holds is in force and the new "
            "settings change nothing; to prune further, load it with load_pruned and start a new run."
        )
        return
    callback.state, forgotten = without_what_depends_on(callback.state, changed)
    recorder.history.settings = settings_of(callback)
    learned = f"; what was learned under the former ones ({', '.join(forgotten)}) is forgotten" if forgotten else ""
    warn(
        f"{begin}the new settings hold for the prunes that are still to come ({callback.steps_done + 1} to "
        f"{callback.steps_told}){learned}; {now}, and what has been pruned cannot come back."
    )


def _told(changed: Mapping[str, Changed], which: str) -> str:
    return ", ".join(f"{name}={getattr(values, which)!r}" for name, values in changed.items())


def tell_of_other_callbacks(trainer: "pl.Trainer", callback: "PruningCallback", states: Mapping[str, Any]) -> None:
    """Say that a callback begins anew, where a checkpoint was written with another pruning callback in its place.

    Args:
        trainer: The trainer.
        callback: The callback.
        states: The states of all callbacks in the checkpoint, by their keys.
    """
    if callback.state_key in states or not is_fitting(trainer):
        return
    here = {other.state_key for other in trainer.callbacks}  # type: ignore[attr-defined]
    others = [
        key.partition("{")[0]
        for key, state in states.items()
        if key not in here and isinstance(state, dict) and {"steps_done", "history"} <= state.keys()
    ]
    if others:
        warn(
            f"The checkpoint was written with {', '.join(others)} and holds no state of this "
            f"{type(callback).__name__}: its settings hold, its schedule begins anew, and what has been pruned cannot "
            "come back."
        )
