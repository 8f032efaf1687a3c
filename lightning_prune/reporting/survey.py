"""A survey of budgets: what each of several methods leaves of a network, and how good that is, before any training.

It is kept in a file that grows row by row, so that a survey that was broken off goes on, and one that is complete is
shown again. A file is about one network with its weights on one data set.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.files import written_whole
from lightning_prune.plain import MisfitError, made
from lightning_prune.reporting.charts import LineChart, line_chart
from lightning_prune.reporting.history import accuracies_first
from lightning_prune.reporting.report import templates

__all__ = [
    "ALL_BATCHES",
    "Row",
    "Survey",
    "best_first",
    "middle",
    "read_survey",
    "same_settings",
    "shown_metric",
    "speed_up",
    "write_survey",
]

ALL_BATCHES = 2**31
"""So many validation batches, or more, stand for all that there are."""

_VERSION = 1
_LITTLE_IS_GOOD = ("loss", "error", "perplexity", "mse", "mae", "wer", "cer")


@dataclass
class Row:
    """One network that was tried.

    Attributes:
        method: What scored its channels.
        keep: The fraction of the cost that was asked for.
        settings: The settings that it was made with, by name, the metric of the budget among them.
        refusal: Why there is no such network; empty if there is one.
        kept: What is kept of it, as fractions of the original, by metric.
        flops: FLOPs of the example inputs.
        params: Number of parameters that channels are slices of.
        times: Milliseconds of a forward pass of the original network and of this one, in each of some turns.
        widths: Channels that are kept, by group name.
        metrics: The module's own validation right after the compensated prune, by name.
        seconds: How long all of that took.
        census: What a search has tried to find it, if one has.
    """

    method: str
    keep: float
    settings: dict[str, Any]
    refusal: str = ""
    kept: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    params: float = 0.0
    times: list[list[float]] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    census: str = ""


@dataclass
class Survey:
    """What was measured of a network.

    Attributes:
        model: Class of the network.
        weights: Digest of its weights.
        data: Digest of the data that it was measured on.
        data_settings: The data module, with its settings.
        groups: Original number of channels, by group name.
        flops: FLOPs of the original network.
        params: Number of its parameters that channels are slices of.
        before: Its validation metrics, by the number of validation batches that were asked for.
        rows: The networks that were tried.
    """

    model: str
    weights: str
    data: str
    data_settings: dict[str, Any]
    groups: dict[str, int]
    flops: float
    params: float
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def row(self, method: str, keep: float, settings: dict[str, Any]) -> Row | None:
        """Return the network that was tried, or None."""
        found = [row for row in self.rows_of(settings) if (row.method, row.keep) == (method, keep)]
        return found[0] if found else None

    def rows_of(self, settings: dict[str, Any]) -> list[Row]:
        """Return the networks that were made with some settings."""
        return [row for row in self.rows if row.settings == settings]

    def other_than(self, other: "Survey") -> str:
        """Say what another survey is about that this one is not; empty if it is about the same."""
        if self.weights != other.weights:
            return "other weights"
        if self.data != other.data or self.data_settings != other.data_settings:
            return "other data"
        return ""


# -- which is best -----------------------------------------------------------------------------------------------------


def same_settings(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two networks are made alike, however many validation batches they were measured on."""
    return {**one, "validate_batches": 0} == {**other, "validate_batches": 0}


def shown_metric(rows: Sequence[Row]) -> str:
    """Return the metric that stands for how good a network is; empty if nothing was measured."""
    names = {name for row in rows for name in row.metrics}
    return min(names, key=accuracies_first, default="")


def best_first(rows: Sequence[Row]) -> list[Row]:
    """Return rows by how good their networks are; those without a network, or a measured one, come last."""
    names = sorted({name for row in rows for name in row.metrics}, key=accuracies_first)

    def places(row: Row) -> list[float]:
        return [_place(row, name) for name in names]  # small splits have many networks of one accuracy

    return sorted(rows, key=places)


def _place(row: Row, metric: str) -> float:
    value = row.metrics.get(metric, math.nan)
    if math.isnan(value):
        return math.inf
    little_is_good = any(word in metric.lower() for word in _LITTLE_IS_GOOD)
    return value if little_is_good else -value


# -- files -------------------------------------------------------------------------------------------------------------


def write_survey(path: Path, survey: Survey) -> None:
    """Write a survey as JSON, and beside it as a page; each file is there whole or not at all.

    Args:
        path: The file for JSON; that of the page ends in ``.html``.
        survey: What to write.
    """
    content = {"version": _VERSION, **asdict(survey)}
    with written_whole(path) as file:
        file.write_text(json.dumps(content, indent=1))
    with written_whole(path.with_suffix(".html")) as file:
        file.write_text(_page(survey), encoding="utf-8", errors="backslashreplace")


def read_survey(path: Path) -> Survey | None:
    """Read a survey; None if there is no file.

    Raises:
        ValueError: If the file is no survey, or of a newer format.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("version")
        if version != _VERSION:
            raise MisfitError("version", f"is {version!r}, and this lightning-prune reads {_VERSION}")
        survey: Survey = made(Survey, content)
    except (ValueError, KeyError, AttributeError, TypeError) as raised:
        raise ValueError(
            f"{str(path)!r} is no survey of `lightning-prune plan` ({raised}): give another file, or remove it."
        ) from raised
    return survey


# -- the page ----------------------------------------------------------------------------------------------------------


def speed_up(row: Row) -> tuple[float, float, float]:
    """Return how many times as fast a network is as the original: lower quartile, median, upper quartile."""
    ratios = sorted(one / other for one, other in zip(*row.times, strict=True))
    quarter = (len(ratios) - 1) // 4
    return ratios[quarter], middle(ratios), ratios[-1 - quarter]


def middle(values: Sequence[float]) -> float:
    """Return the upper median of some numbers.

    Example:
        >>> middle([3.0, 1.0, 2.0])
        2.0
    """
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _page(survey: Survey) -> str:
    """Write a survey as HTML: a curve for each method, and all rows."""
    metric = shown_metric(survey.rows)
    template = templates().get_template("survey.html.jinja")
    charts = _charts(survey, metric)
    rows = [row for row in survey.rows if not row.refusal]
    return template.render(
        survey=survey,
        charts=charts,
        rows=rows,
        metric=metric,
        speed_up=speed_up,
        middle=middle,
        all_batches=ALL_BATCHES,
    )


def _charts(survey: Survey, metric: str) -> list[LineChart]:
    charts = []
    every = [row.metrics[metric] for row in survey.rows if metric in row.metrics]
    kinds = dict.fromkeys((row.method, row.settings["metric"]) for row in survey.rows if not row.refusal)
    for method, budget in kinds:
        rows = [row for row in survey.rows if (row.method, row.settings["metric"]) == (method, budget)]
        points = [(100 * row.keep, row.metrics[metric]) for row in rows if metric in row.metrics]
        across = f"percent of the {budget} asked for"
        chart = line_chart(f"{method}: {metric}", sorted(points), across=across, beside=every)
        charts.append(chart)
    return charts
