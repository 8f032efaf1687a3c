"""What pruning changed, in the loggers of the Trainer: numbers in all of them, pictures where a logger shows them."""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor

from lightning_prune.reporting.history import History
from lightning_prune.reporting.progress import warn
from lightning_prune.reporting.summary import summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["folder", "log_end", "log_prune"]


def folder(module: str) -> str:
    """Return what the names of all figures of a run begin with, but for those of groups, which are unique.

    Args:
        module: Dotted name of the part that is pruned; empty for the whole model.
    """
    return f"prune/{module}" if module else "prune"


def log_prune(trainer: "pl.Trainer", history: History, scores: Mapping[str, Tensor]) -> None:
    """Log what the last prune has left; for the first rank.

    Every logger gets the widths and the time. TensorBoard, MLflow and loggers with ``log_image``, such as that of
    Weights & Biases, also get two figures, the widths and the metric against the FLOPs so far, and TensorBoard a
    histogram of the scores of each group.

    Args:
        trainer: The trainer.
        history: The history of the run, the last prune included.
        scores: The scores that led to it.
    """
    last = history.prunes[-1]
    numbers = {f"prune/channels/{name}": float(width) for name, width in last.widths.items()}
    numbers[f"{folder(history.module)}/latency_ms"] = last.left.latency_ms
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=_step(trainer))
        if isinstance(logger, TensorBoardLogger):
            for name, values in scores.items():
                ranked = values[values.isfinite()]
                if len(ranked):
                    logger.experiment.add_histogram(f"prune/scores/{name}", ranked, _step(trainer))
    _log_figures(trainer, history)


def log_end(trainer: "pl.Trainer", history: History) -> None:
    """Log the network before and after as a table of text, where a logger shows text, and the last figures.

    Args:
        trainer: The trainer.
        history: The history of the run, ``after`` included.
    """
    assert history.after is not None
    table = "\n".join(f"    {line}" for line in summarize(history.before, history.after))  # Markdown, as it stands
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"{folder(history.module)}/summary", table, _step(trainer))
    _log_figures(trainer, history)


def _step(trainer: "pl.Trainer") -> int:
    """Return the step that Lightning logs at, which is not ``global_step`` where there are several optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log_figures(trainer: "pl.Trainer", history: History) -> None:
    shows = [show for logger in trainer.loggers if (show := _shows_figures(logger, _step(trainer))) is not None]
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
    if isinstance(logger, TensorBoardLogger):
        return lambda name, figure: logger.experiment.add_figure(name, figure, step, close=False)
    if isinstance(logger, MLFlowLogger):
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
            "The figures are left out of the logs: matplotlib draws them, which `pip install "
            '"lightning-prune[report]"` installs.'
        )
    return found
