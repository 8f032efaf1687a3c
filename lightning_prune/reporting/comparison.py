"""Several networks side by side: what runs have come to, pruned or not, or checkpoints that were measured together."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.planning.spread import Spread
from lightning_prune.reporting.history import History, read_histories
from lightning_prune.reporting.measurement import Measurement

__all__ = ["Column", "RunRecord", "column_of", "read_run", "side_by_side"]

_METRICS = "metrics.csv"  # of Lightning's CSVLogger
_EVENTS = "events.out.tfevents*"  # of TensorBoard


@dataclass(frozen=True)
class Column:
    """One network of several.

    Attributes:
        name: What to call it.
        params: Number of parameters; None where nobody has counted them.
        flops: FLOPs of the example inputs; None likewise.
        latency: Milliseconds of a forward pass, where all networks took turns.
        speed: How many times as fast it is as its own original, in words.
        metrics: Validation metrics by name.
    """

    name: str
    params: int | None = None
    flops: int | None = None
    latency: Spread | None = None
    speed: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, measured: Measurement, latency: Spread | None = None, speed: str = "") -> "Column":
        """Return the column of a network that has been counted."""
        return cls(name, measured.params, measured.flops, latency, speed, measured.metrics)


@dataclass(frozen=True)
class RunRecord:
    """What a run has left in its folder.

    Attributes:
        name: The folder.
        histories: What pruning callbacks have noted; none in a run without them.
        metrics: Validation metrics at its end, by name.
    """

    name: str
    histories: list[History]
    metrics: dict[str, float]


def read_run(run: str | Path) -> RunRecord:
    """Read a run, pruned or not.

    Args:
        run: Its folder. Without a pruning callback, what its `CSVLogger` or TensorBoard has written there is read.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it that tells of a run.
        ValueError: If a file is damaged.
    """
    folder = Path(run)
    if not folder.is_dir() or any(folder.glob("pruning*.json")):
        histories = read_histories(folder)  # says it if there is no folder
        return RunRecord(str(run), histories, histories[0].last.metrics)
    if (folder / _METRICS).is_file():
        return RunRecord(str(run), [], _last_in_table(folder / _METRICS))
    if any(folder.glob(_EVENTS)):
        return RunRecord(str(run), [], _last_events(folder))
    read_histories(folder)  # says that nothing is there, and where there are runs
    raise AssertionError


def column_of(record: RunRecord) -> Column:
    """Return the column of a run: of the network at its end, with the metrics of the last validation."""
    if not record.histories:
        return Column(record.name, metrics=record.metrics)
    history = record.histories[0]
    speed = ""
    if history.speed is not None:
        speed = history.speed.times_as_fast or "no difference"
    return Column.of(record.name, history.last, speed=speed)


def side_by_side(columns: Sequence[Column]) -> list[list[str]]:
    """Return rows of cells: the names, then what is known, the first column as it is and the others beside it.

    Args:
        columns: The networks.

    Example:
        >>> a, b = Column("a", 200, 4000, metrics={"val/acc": 0.5}), Column("b", 100, 1000, metrics={"val/acc": 0.75})
        >>> for row in side_by_side([a, b]):
        ...     print(row)
        ['', 'a', 'b']
        ['parameters', '200', '100 (50.0%)']
        ['FLOPs', '4,000', '1,000 (25.0%)']
        ['val/acc', '0.5000', '0.7500 (+0.2500)']
    """
    rows = [
        _row("", columns, "name"),
        _row("parameters", columns, "params"),
        _row("FLOPs", columns, "flops"),
        _row("latency (ms)", columns, "latency"),
        _row("times as fast as its original", columns, "speed"),
    ]
    names: dict[str, None] = {}
    for column in columns:
        names.update(dict.fromkeys(sorted(column.metrics)))
    for name in names:
        values = [column.metrics.get(name) for column in columns]
        rows.append([name, *_beside_the_first(values)])
    return [row for row in rows if any(row[1:])]


def _row(head: str, columns: Sequence[Column], attribute: str) -> list[str]:
    """Return a row of one attribute; its cells are empty if no network has it."""
    values = [getattr(column, attribute) for column in columns]
    if not any(values):
        return [head, *("" for _ in values)]
    return [head, *_beside_the_first(values)]


def _beside_the_first(values: Sequence[Any]) -> list[str]:
    """Write values, and how far numbers are from the first: counts as a share of it, metrics by the difference."""
    first = values[0]
    cells = [_told(first)]
    for value in values[1:]:
        cell = _told(value)
        if isinstance(value, int) and first:
            cell += f" ({value / first:.1%})"
        elif isinstance(value, float) and first is not None:
            cell += f" ({value - first:+.4f})"
        cells.append(cell)
    return cells


def _told(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# -- runs without a pruning callback -----------------------------------------------------------------------------------


def _last_in_table(path: Path) -> dict[str, float]:
    """Return the last value of each validation metric in a table of a CSVLogger."""
    found = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name, value in row.items():
                if name.startswith("val") and value:
                    found[name] = float(value)
    except (ValueError, csv.Error, AttributeError) as raised:  # no text, no table, more cells than names
        raise ValueError(f"{str(path)!r} is damaged: it is no table of metrics, as CSVLogger writes it.") from raised
    return found


def _last_events(folder: Path) -> dict[str, float]:
    """Return the last value of each validation metric that TensorBoard has."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as raised:
        raise ValueError(
            f"What is in {str(folder)!r} was written for TensorBoard, which is not installed: pip install tensorboard."
        ) from raised
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        if name.startswith("val"):
            last = events.Scalars(name)[-1]
            found[name] = last.value
    return found
