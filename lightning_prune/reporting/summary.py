"""What pruning changed, as a table in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

__all__ = ["Measurement", "aligned", "summarize", "whereabouts"]


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


def summarize(before: Measurement, after: Measurement, names: tuple[str, str] = ("before", "after")) -> list[str]:
    """Write a table of a network before and after, line by line.

    Args:
        before: The network before the first prune.
        after: The network at the end.
        names: What to call them.
    """
    rows = [
        ("", *names, "ratio"),
        _row("parameters", before.params, after.params, "{:,.0f}"),
        _row("FLOPs", before.flops, after.flops, "{:,.0f}"),
        _row("latency (ms)", before.latency_ms, after.latency_ms, "{:.2f}"),
    ]
    both = sorted(before.metrics.keys() & after.metrics.keys())
    rows += [_row(name, before.metrics[name], after.metrics[name], "{:.4f}") for name in both]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Write rows of cells as lines of equal length, with a rule under the first.

    Example:
        >>> print("\n".join(aligned([("batch", "ms"), ("1", "2.50")])))
        batch    ms
        -----------
            1  2.50
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"{after / before:.3f}" if before else "-"
    return name, form.format(before), form.format(after), ratio


def whereabouts(trainer: "pl.Trainer", run: Path | None) -> list[str]:
    """Say where the logs and the checkpoint are and how to load it; to be called on all ranks.

    Args:
        trainer: The trainer.
        run: Folder with the history of the run, if there is one.
    """
    lines = []
    log_dir = trainer.log_dir
    if log_dir:
        lines.append(f"logs:       {log_dir}")
    if run is not None:
        lines.append(f"report:     lightning-prune report {run}")
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    if path:
        module = type(trainer.lightning_module)
        lines.append(f"checkpoint: {path}")
        lines.append("load it:    from lightning_prune import load_pruned")
        lines.append(f"            from {module.__module__} import {module.__name__}")
        lines.append(f"            model = load_pruned({module.__name__}, {path!r})")
    return lines
