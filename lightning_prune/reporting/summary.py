"""What pruning changed, as a table in the terminal."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune.files import read_without_objects
from lightning_prune.reporting.load_lines import load_lines
from lightning_prune.reporting.measurement import Measurement
from lightning_prune.reporting.speed import Speed

__all__ = ["aligned", "summarize", "whereabouts"]


def summarize(before: Measurement, after: Measurement, speed: Speed | None = None) -> list[str]:
    r"""Write a table of a network before and after, line by line.

    Where fvcore and the cost model do not count the same FLOPs, lines below the table say so. Times are told with their
    quartiles, where they were taken in turns; how many times as fast the network is, if the quartiles do not overlap.

    Args:
        before: The network before the first prune.
        after: The network at the end.
        speed: The times of both, taken in turns; None if they were not.

    Example:
        >>> before, after = Measurement(200, 4000, 2.0), Measurement(100, 1000, 1.0, cost_model_flops=1010)
        >>> print("\n".join(summarize(before, after, Speed([2.0, 2.2, 2.1], [1.0, 1.1, 1.0], "CPU, 1 thread"))))
                                before             after  ratio
        -------------------------------------------------------
          parameters               200               100  0.500
               FLOPs             4,000             1,000  0.250
        latency (ms)  2.10 (2.05-2.15)  1.00 (1.00-1.05)      -
        speed: 2.00x as fast (2.00-2.05)
        FLOPs after: 1,000 counted by fvcore, 1,010 by the cost model (+10)
    """
    rows = [
        ("", "before", "after", "ratio"),
        _row("parameters", before.params, after.params, "{:,.0f}"),
        _row("FLOPs", before.flops, after.flops, "{:,.0f}"),
    ]
    if speed is not None:
        row = ("latency (ms)", str(speed.spread_before), str(speed.spread_after), "-")
        rows.append(row)
    metrics = before.metrics.keys() & after.metrics.keys()
    for metric in sorted(metrics):
        row = _row(metric, before.metrics[metric], after.metrics[metric], "{:.4f}")
        rows.append(row)
    lines = aligned(rows)
    if speed is not None:
        lines.append(f"speed: {speed.verdict}")
    for name, measured in (("before", before), ("after", after)):
        if measured.flops_remark:
            lines.append(f"FLOPs {name}: {measured.flops_remark}")
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Write rows of cells as lines of equal length, with a rule under the first.

    Example:
        >>> print("\n".join(aligned([("batch", "ms"), ("1", "2.50")])))
        batch    ms
        -----------
            1  2.50
    """
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    head, *body = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    rule = "-" * len(head)
    return [head, rule, *body]


def whereabouts(trainer: Any, run: Path | None, checkpoint: str) -> list[str]:
    """Say where the logs and the checkpoint are and how to load it; to be called on all ranks.

    Args:
        trainer: The Trainer.
        run: Folder with the history of the run, if there is one.
        checkpoint: The file with the network, if there is one.
    """
    lines = []
    log_dir = trainer.log_dir  # asks all ranks; without a logger it is where a checkpoint would lie
    if log_dir and trainer.loggers:
        lines.append(f"logs:       {log_dir}")
    if run is not None:
        lines.append(f"report:     lightning-prune report {run}")
    if checkpoint and trainer.is_global_zero:
        place = checkpoint if "://" in checkpoint else os.path.abspath(checkpoint)
        lines.append(f"checkpoint: {place}")
        lines.append("load it:")
        lines += _how_to_load(type(trainer.lightning_module), place)
    return lines


def _how_to_load(kind: type, path: str) -> list[str]:
    """Return lines of Python that load a checkpoint."""
    try:
        content = read_without_objects(path)
    except Exception:  # not on this machine, or not written by torch.save
        return [f"trainer.test({kind.__name__}(...), ckpt_path={path!r})  # with the plugins that it was written by"]
    return load_lines(kind, path, content)


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    ratio = "-"
    if before:
        ratio = f"{after / before:.3f}"
    return name, form.format(before), form.format(after), ratio
