"""Loggers of the Trainer, and what they are told: numbers all of them, pictures and text where a logger shows them.

This is the only module of the room that knows Lightning.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor

from lightning_prune.namesakes import namesakes
from lightning_prune.progress import aside
from lightning_prune.reporting.history import History, write_history
from lightning_prune.reporting.summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "folder", "log_end", "log_history", "log_hyperparameters", "log_prune", "run_folder", "say", "warn",
    "without_placeholder",
]  # fmt: skip


def say(text: str) -> None:
    """Log a message, from the first rank, without a bar in its way."""
    with aside():
        rank_zero_info(text)


def warn(text: str) -> None:
    """Warn, from the first rank, without a bar in the way."""
    with aside():
        rank_zero_warn(text)


def run_folder(trainer: "pl.Trainer") -> Path | None:
    """Return the folder that the first logger writes to, or None if there is no logger that has one on this machine.

    Args:
        trainer: The Trainer.
    """
    for logger in trainer.loggers:
        found = _folder_of(logger)
        if found is not None and "://" not in str(found):  # as in s3://bucket/logs
            return Path(found)
    return None


def _folder_of(logger: Logger) -> str | os.PathLike[str] | None:
    log_dir = getattr(logger, "log_dir", None)
    if isinstance(log_dir, str | os.PathLike):
        return log_dir
    if not isinstance(logger.save_dir, str | os.PathLike):
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir, str(logger.name), version)  # as ModelCheckpoint finds its folder


def without_placeholder(trainer: "pl.Trainer") -> None:
    """Let TensorBoard show no ``hp_metric`` of -1 beside the hyper-parameters; to be called before they are logged.

    Args:
        trainer: The Trainer.
    """
    for logger in trainer.loggers:
        if isinstance(logger, namesakes(TensorBoardLogger)):
            logger._default_hp_metric = False


def log_hyperparameters(trainer: "pl.Trainer", module: str, kept: Mapping[str, float]) -> None:
    """Let TensorBoard show the hyper-parameters beside what is kept of the network; for the first rank.

    Args:
        trainer: The Trainer.
        module: Dotted name of the submodule that is pruned; empty for the whole model.
        kept: What is kept when training starts, as a fraction of the original, by metric.
    """
    metrics = {f"{folder(module)}/keep_{metric}": fraction for metric, fraction in kept.items()}
    for logger in trainer.loggers:
        if isinstance(logger, namesakes(TensorBoardLogger)) and logger.hparams:
            logger.log_hyperparams(logger.hparams, metrics, _step(trainer))


def log_history(trainer: "pl.Trainer", history: History) -> None:
    """Write a history into the folder of the run, if there is one; for the first rank.

    Args:
        trainer: The Trainer.
        history: What to write.
    """
    run = run_folder(trainer)
    if run is not None:
        write_history(run, history)


def folder(module: str) -> str:
    """Return what the names of all figures of a run begin with, but for those of groups, which are unique.

    Args:
        module: Dotted name of the submodule that is pruned; empty for the whole model.
    """
    return f"prune/{module}" if module else "prune"


def log_prune(trainer: "pl.Trainer", history: History, scores: Mapping[str, Tensor]) -> None:
    """Log the network after the last prune; for the first rank.

    Every logger gets the widths, the time and the validation metrics around it. TensorBoard, MLflow and loggers with
    ``log_image``, such as that of Weights & Biases, also get two figures, the widths and the metric against the FLOPs
    so far, and TensorBoard a histogram of the scores of each group.

    Args:
        trainer: The Trainer.
        history: The history of the run, the last prune included.
        scores: The scores that led to it: (channels,) by group name.
    """
    prune = history.prunes[-1]
    numbers = {f"prune/channels/{group}": float(width) for group, width in prune.widths.items()}
    prefix = folder(history.module)
    numbers[f"{prefix}/latency_ms"] = prune.after.latency_ms
    for when, metrics in asdict(prune.metrics).items():
        numbers.update({f"{prefix}/{when}/{name}": value for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=_step(trainer))
        if isinstance(logger, namesakes(TensorBoardLogger)):
            _log_histograms(logger, scores, _step(trainer))
    _log_figures(trainer, history)


def log_end(trainer: "pl.Trainer", history: History) -> None:
    """Log the network before and after as a table of text, where a logger shows text, and the last figures.

    Args:
        trainer: The Trainer.
        history: The history of the run, ``after`` included.
    """
    assert history.after is not None
    lines = [
        f"    {line}" for line in summarize(history.before, history.after, history.speed)
    ]  # Markdown, as it stands
    for logger in trainer.loggers:
        if isinstance(logger, namesakes(TensorBoardLogger)):
            logger.experiment.add_text(f"{folder(history.module)}/summary", "\n".join(lines), _step(trainer))
    _log_figures(trainer, history)


def _step(trainer: "pl.Trainer") -> int:
    """Return the step that Lightning logs at, which is not ``global_step`` where there are several optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log_histograms(logger: TensorBoardLogger, scores: Mapping[str, Tensor], step: int) -> None:
    for group, values in scores.items():
        finite = values[values.isfinite()]
        if len(finite):
            logger.experiment.add_histogram(f"prune/scores/{group}", finite, step)


def _log_figures(trainer: "pl.Trainer", history: History) -> None:
    shown_by = [_shows_figures(logger, _step(trainer)) for logger in trainer.loggers]
    shows = [show for show in shown_by if show is not None]
    if not shows or not _can_draw():
        return
    from lightning_prune.reporting import figures

    drawn = {"widths": figures.widths(history)}
    if history.shown_metric:
        drawn["metric_against_flops"] = figures.metric_against_flops(history, history.shown_metric)
    for show in shows:
        for name, figure in drawn.items():
            show(f"{folder(history.module)}/{name}", figure)


def _shows_figures(logger: Logger, step: int) -> "Callable[[str, Figure], Any] | None":
    """Return what shows a figure under a name in a logger, or None if it shows no figures."""
    if isinstance(logger, namesakes(TensorBoardLogger)):
        return lambda name, figure: logger.experiment.add_figure(name, figure, step, close=False)
    if isinstance(logger, namesakes(MLFlowLogger)):
        return lambda name, figure: logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step}.png")
    if hasattr(logger, "log_image"):  # that of Weights & Biases, and others after its example
        return lambda name, figure: logger.log_image(key=name, images=[_picture(figure)], step=step)
    return None


def _picture(figure: "Figure") -> Image.Image:
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream)


@cache  # so that it warns once
def _can_draw() -> bool:
    found = find_spec("matplotlib") is not None
    if not found:
        warn(
            "There are no figures in the logs: matplotlib draws them, which `pip install "
            '"lightning-prune[report]"` installs.'
        )
    return found
