"""What pruning changed, as a table in the terminal and as scalars in the logger."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_prune.plan import PruningPlan

__all__ = ["Measurement", "log_prune", "summarize", "whereabouts"]


@dataclass
class Measurement:
    """A network in numbers.

    Attributes:
        params: Number of parameters.
        flops: FLOPs of the example inputs; one FLOP is one multiply-add.
        latency_ms: Median time of a forward pass of the example inputs, in milliseconds.
        metrics: Validation metrics by name.
    """

    params: int
    flops: int
    latency_ms: float
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Measurement":
        """Make a measurement from what `to_json` returned."""
        return cls(**content)


def summarize(before: Measurement, after: Measurement) -> list[str]:
    """Write a table of a network before and after, line by line.

    Args:
        before: The network before the first prune.
        after: The network at the end.
    """
    rows = [
        ("", "before", "after", "ratio"),
        _row("parameters", before.params, after.params, "{:,.0f}"),
        _row("FLOPs", before.flops, after.flops, "{:,.0f}"),
        _row("latency (ms)", before.latency_ms, after.latency_ms, "{:.2f}"),
    ]
    both = sorted(before.metrics.keys() & after.metrics.keys())
    rows += [_row(name, before.metrics[name], after.metrics[name], "{:.4f}") for name in both]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"{after / before:.3f}" if before else "-"
    return name, form.format(before), form.format(after), ratio


def whereabouts(trainer: "pl.Trainer") -> list[str]:
    """Say where the logs and the checkpoint are and how to load it; to be called on all ranks."""
    lines = []
    log_dir = trainer.log_dir
    if log_dir:
        lines.append(f"logs:       {log_dir}")
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    if path:
        module = type(trainer.lightning_module)
        lines.append(f"checkpoint: {path}")
        lines.append("load it:    from lightning_prune import load_pruned")
        lines.append(f"            from {module.__module__} import {module.__name__}")
        lines.append(f"            model = load_pruned({module.__name__}, {path!r})")
    return lines


def log_prune(trainer: "pl.Trainer", plan: PruningPlan, scores: Mapping[str, Tensor], measured: Measurement) -> None:
    """Log what a prune has left to every logger and, where a logger draws histograms, the scores; for the first rank.

    Args:
        trainer: The trainer.
        plan: The plan that has just been applied.
        scores: The scores that led to it.
        measured: The network that is left.
    """
    numbers = {f"prune/channels/{name}": float(width) for name, width in plan.widths.items()}
    numbers["prune/latency_ms"] = measured.latency_ms
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            for name, values in scores.items():
                ranked = values[values.isfinite()]
                if len(ranked):
                    logger.experiment.add_histogram(f"prune/scores/{name}", ranked, trainer.global_step)
