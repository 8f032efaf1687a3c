"""A run that is interrupted by Ctrl-C ends with the line that goes on with it."""

import os
import shlex
import sys
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_prune.callbacks.monitors import model_checkpoints
from lightning_prune.callbacks.schedule import pruning_callbacks
from lightning_prune.reporting.loggers import say

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["resuming_command", "tell_how_to_resume"]


def tell_how_to_resume(trainer: "pl.Trainer", callback: "PruningCallback") -> None:
    """Say how the run goes on that was interrupted; of several pruning callbacks the last one does.

    Args:
        trainer: The trainer.
        callback: The callback that was interrupted, whose ``result_path`` may be a file of the network as it is now.
    """
    if pruning_callbacks(trainer)[-1] is not callback:
        return
    written = "" if trainer.world_size > 1 else callback.result_path  # of several ranks it holds no optimizers
    path = written or _newest(trainer)
    if not path:
        say("No checkpoint has been written yet from which the run could go on: start it anew.")
    elif _by_command_line(trainer):
        typed = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :]  # before configs were looked for
        say(f"resume: {resuming_command([sys.argv[0], *typed], path)}")
    else:
        data = "" if trainer.datamodule is None else ", datamodule=..."  # type: ignore[attr-defined]
        say(f"resume: trainer.fit({type(trainer.lightning_module).__name__}(...){data}, ckpt_path={path!r})")


def _newest(trainer: "pl.Trainer") -> str:
    """Return the newest file of a ModelCheckpoint from which a run can go on, or ""."""
    savers = [saver for saver in model_checkpoints(trainer) if not saver.save_weights_only]
    named = [(saver.last_model_path, saver.best_model_path, *saver.best_k_models) for saver in savers]
    here = {path for paths in named for path in paths if path and os.path.isfile(path)}
    return os.path.abspath(max(here, key=os.path.getmtime)) if here else ""


def _by_command_line(trainer: "pl.Trainer") -> bool:
    """Tell whether a LightningCLI has made the trainer: it lets a callback keep the config."""
    return any(type(callback).__name__ == "SaveConfigCallback" for callback in trainer.callbacks)  # type: ignore[attr-defined]


def resuming_command(arguments: list[str], path: str) -> str:
    """Return a command line that goes on from a checkpoint.

    Args:
        arguments: The command line of the run, as ``sys.argv`` has it.
        path: The checkpoint.

    Example:
        >>> typed = ["/usr/bin/lightning-prune", "fit", "--config", "quickstart.yaml", "--ckpt_path=old.ckpt"]
        >>> resuming_command(typed, "logs/last one.ckpt")
        "lightning-prune fit --config quickstart.yaml --ckpt_path 'logs/last one.ckpt'"
    """
    program, *typed = arguments
    name = os.path.basename(program)
    begin = [name]
    if name == "__main__.py":
        begin = ["python", "-m", os.path.basename(os.path.dirname(program))]
    elif name.endswith(".py"):
        begin = ["python", program]
    return shlex.join([*begin, *_without_option(typed, "--ckpt_path"), "--ckpt_path", path])


def _without_option(typed: list[str], option: str) -> list[str]:
    """Return arguments without an option and its value."""
    rest = []
    skipped = False
    for argument in typed:
        if skipped:
            skipped = False
        elif argument == option:
            skipped = True
        elif not argument.startswith(f"{option}="):
            rest.append(argument)
    return rest
