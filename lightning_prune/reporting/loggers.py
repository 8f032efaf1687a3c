"""What pruning changed, in the loggers of the Trainer: numbers in all of them, pictures where a logger shows them."""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.reporting.history import History
from lightning_prune.reporting.summary import summarize

__all__ = ["log_end", "log_prune"]


def log_prune(trainer: "pl.Trainer", history: History, scores: Mapping[str, Tensor]) -> None:
    """Log what the last prune has left; for the first rank.

    Every logger gets the widths and the time. TensorBoard also gets a histogram of the scores of each group, and as
    figures the widths and the metric against the FLOPs so far.

    Args:
        trainer: The trainer.
        history: The history of the run, the last prune included.
        scores: The scores that led to it.
    """
    last = history.prunes[-1]
    numbers = {f"prune/channels/{name}": float(width) for name, width in last.widths.items()}
    numbers["prune/latency_ms"] = last.left.latency_ms
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            for name, values in scores.items():
                ranked = values[values.isfinite()]
                if len(ranked):
                    logger.experiment.add_histogram(f"prune/scores/{name}", ranked, trainer.global_step)
            _log_figures(trainer, logger, history)


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
            logger.experiment.add_text("prune/summary", table, trainer.global_step)
            _log_figures(trainer, logger, history)


def _log_figures(trainer: "pl.Trainer", logger: TensorBoardLogger, history: History) -> None:
    if not _can_draw():
        return
    from lightning_prune.reporting import figures

    logger.experiment.add_figure("prune/widths", figures.widths(history), trainer.global_step)
    metric = history.shown_metric
    if metric:
        drawn = figures.metric_against_flops(history, metric)
        logger.experiment.add_figure("prune/metric_against_flops", drawn, trainer.global_step)


@cache  # so that it warns once
def _can_draw() -> bool:
    found = find_spec("matplotlib") is not None
    if not found:
        rank_zero_warn(
            "The figures are left out of TensorBoard: matplotlib draws them, which `pip install "
            '"lightning-prune[report]"` installs.'
        )
    return found
