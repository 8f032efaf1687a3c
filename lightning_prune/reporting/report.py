"""Report of a run: one HTML page that tells what pruning asked for, what it did, and what it cost."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_prune.files import check_folder, written_whole
from lightning_prune.reporting.charts import LineChart, Mark, line_chart
from lightning_prune.reporting.comparison import RunRecord, column_of, read_run, side_by_side
from lightning_prune.reporting.history import FEW, History, Layer, Prune, accuracies_first, read_histories
from lightning_prune.reporting.measurement import Measurement
from lightning_prune.reporting.speed import Speed

__all__ = ["render", "templates", "write_comparison", "write_report"]

_BUDGETS = {"asked": "asked for, at most", "achieved": "kept", "reachable": "could be kept, at least"}


def write_report(run: str | Path, out: str | Path | None = None, baseline: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: The folder of the run, such as ``logs/quickstart/version_0``, or a checkpoint of it.
        out: The file to write; default ``report.html`` in that folder, or a file beside the checkpoint.
        baseline: The folder of another run, pruned or not, whose figures stand beside those of this one.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such run, no pruning callback wrote into it, or there is no folder for the
            file.
        ValueError: If the history in it is damaged, or of a newer format.
    """
    run = Path(run)
    histories = read_histories(run)
    records = []
    if baseline is not None:
        records = [read_run(baseline), read_run(run)]
    path = run.with_suffix(".html") if run.is_file() else run / "report.html"
    if out is not None:
        path = Path(out)
    check_folder(path)
    config = ""
    config_file = run / "config.yaml"
    if config_file.is_file():
        config = config_file.read_text("utf-8", "replace")
    text = render(histories, str(run), config, records)
    _write(path, text)
    return path


def write_comparison(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the reports of several runs on one page, with a table of all of them at its head.

    Args:
        runs: The folders of the runs, pruned or not; the first is what the others are compared with.
        out: The file to write; default ``compare.html`` in the first folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such run, or nothing in a folder that tells of one.
        ValueError: If what is in it is damaged.
    """
    records = [read_run(run) for run in runs]
    path = Path(runs[0], "compare.html")
    if out is not None:
        path = Path(out)
    check_folder(path)
    pages = []
    for record in records:
        pages += [Page(history, record.name) for history in record.histories]
    text = _page(pages, f"{len(records)} runs", "", records)
    _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may hold half characters


def render(histories: Sequence[History], name: str, config: str = "", records: Sequence[RunRecord] = ()) -> str:
    """Write the report as HTML.

    Args:
        histories: The histories of the run, one for each pruning callback.
        name: Name of the run.
        config: The config of the run, as text; without it the settings of the callbacks are shown alone.
        records: Runs to show side by side; the first is what the others are compared with.
    """
    pages = [Page(history, name) for history in histories]
    return _page(pages, name, config, records)


def _page(pages: Sequence["Page"], name: str, config: str, records: Sequence[RunRecord]) -> str:
    template = templates().get_template("report.html.jinja")
    compared = []
    if records:
        columns = [column_of(record) for record in records]
        compared = side_by_side(columns)
    return template.render(run=name, pages=pages, config=config, budgets=_BUDGETS, compared=compared)


@cache
def templates() -> Environment:
    """Return the templates of the report, which escape what they are given."""
    environment = Environment(
        loader=PackageLoader("lightning_prune.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["fraction"] = _fraction
    environment.filters["share"] = _share
    return environment


@dataclass(frozen=True)
class Tile:
    """One number at the head of the page.

    Attributes:
        name: What it is.
        number: The number.
        detail: What it was made from.
    """

    name: str
    number: str
    detail: str


@dataclass(frozen=True)
class LayerRow:
    """A layer before the first prune and after the last."""

    before: Layer
    after: Layer

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.before.name

    @property
    def costs(self) -> str:
        """Its FLOPs and parameters, in words."""
        before, after = self.before, self.after
        flops = f"{before.flops:,.0f} → {after.flops:,.0f} FLOPs"
        params = f"{before.params:,.0f} → {after.params:,.0f} parameters"
        return f"{self.name}: {flops}, {params}"

    @property
    def times(self) -> str:
        """Its milliseconds with their quartiles, and whether they differ; empty if it was not timed in turns."""
        before = self.before.time
        after = self.after.time
        if before is None or after is None:
            return ""
        told = f"{before} → {after}"
        if before.overlaps(after):
            told += ", no difference"
        return told


@dataclass(frozen=True)
class MetricRow:
    """A metric around one prune, or at the end.

    Attributes:
        name: Name of the metric.
        when: Number of the prune, or ``"end"``.
        before: Right before; each of these is empty where there is none.
        uncompensated: Right after, without compensation.
        after: Right after.
    """

    name: str
    when: str
    before: str = ""
    uncompensated: str = ""
    after: str = ""


class Page:
    """What the report tells of one callback.

    Args:
        history: The history that the callback has written.
        run: Name of the run.
    """

    def __init__(self, history: History, run: str) -> None:
        self.history = history
        self.run = run

    @property
    def title(self) -> str:
        """What was pruned, and by what."""
        pruned = self.history.module or self.history.model.rpartition(".")[2]
        return f"{pruned} pruned by {self.history.callback}"

    @property
    def tiles(self) -> list[Tile]:
        """The network now, compared with the original."""
        before, after = self.history.before, self.history.last
        tiles = [
            Tile(
                name="of the FLOPs",
                number=_percent(after.flops, before.flops),
                detail=f"{before.flops:,} → {after.flops:,}",
            ),
            Tile(
                name="of the parameters",
                number=_percent(after.params, before.params),
                detail=f"{before.params:,} → {after.params:,}",
            ),
            _speed_tile(self.history.speed),
        ]
        metric = self.history.shown_metric
        if metric in after.metrics:
            tile = Tile(
                name=metric,
                number=f"{after.metrics[metric]:.4f}",
                detail=_told_before(before, metric),
            )
            tiles.append(tile)
        return tiles

    @property
    def verdict(self) -> str:
        """What is kept, how fast it is and what has become of the metric, in a sentence."""
        before, after = self.history.before, self.history.last
        if not self.history.prunes:
            return "Nothing has been pruned yet."
        flops = _percent(after.flops, before.flops)
        params = _percent(after.params, before.params)
        told = [f"{flops} of the FLOPs and {params} of the parameters are kept"]
        speed = self.history.speed
        if speed is None:
            told.append("how fast it is will be timed at the end of training")
        else:
            told.append(speed.verdict)
        metric = self.history.shown_metric
        if metric in before.metrics and metric in after.metrics:
            now = after.metrics[metric]
            change = now - before.metrics[metric]
            told.append(f"{metric} is {now:.4f}, {change:+.4f} from before the first prune")
        text = "; ".join(told)
        return f"{text}."

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The settings of the callback, by name, as they stand in YAML."""
        told = []
        for name, value in self.history.settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            told.append((name, text))
        return told

    @property
    def are_layers_timed(self) -> bool:
        """Whether the layers were timed in turns."""
        return any(layer.times for layer in self.layers)

    @property
    def flops_remarks(self) -> list[str]:
        """What there is to say about FLOPs that fvcore and the cost model count differently."""
        remarks = {"before": self.history.before.flops_remark, "after": self.history.last.flops_remark}
        return [f"FLOPs {when}: {remark}" for when, remark in remarks.items() if remark]

    @property
    def charts(self) -> list[LineChart]:
        """The FLOPs and the metrics over the epochs."""
        marks = []
        original = self.history.before.flops
        for prune in self.history.prunes:
            kept = _percent(prune.after.flops, original)
            mark = Mark(float(prune.epoch), f"prune {prune.step}: {kept} of the FLOPs kept")
            marks.append(mark)
        for prune in self.history.taken_back:
            for epoch, what in ((prune.epoch, "prune"), (prune.until, "taken back: prune")):
                mark = Mark(float(epoch or 0), f"{what} {prune.step}")
                marks.append(mark)
        charts = [line_chart("FLOPs kept", self._flops_kept(), marks)]
        for metric in self.history.metrics:
            measured = [validation for validation in self.history.epochs if metric in validation]
            values = [(validation["epoch"], validation[metric]) for validation in measured]
            chart = line_chart(metric, values, marks)
            charts.append(chart)
        return charts

    def _flops_kept(self) -> list[tuple[float, float]]:
        """Return the corners of the line that goes down at each prune, and up where one was taken back."""
        original = max(self.history.before.flops, 1)
        changes = [(prune.epoch, prune.after.flops) for prune in (*self.history.prunes, *self.history.taken_back)]
        if self.history.taken_back:
            returned = self.history.taken_back[-1].until or 0
            changes.append((returned, self.history.last.flops))
        kept = 1.0
        corners = [(0.0, kept)]
        for epoch, flops in sorted(changes):
            corners.append((float(epoch), kept))
            kept = flops / original
            corners.append((float(epoch), kept))
        trained = [validation["epoch"] for validation in self.history.epochs]
        last, _ = corners[-1]
        end = max([last, *trained])
        return [*corners, (end, kept)]

    @property
    def compensated(self) -> list[Prune]:
        """The prunes that the weights which are kept made up for."""
        return [prune for prune in self.history.prunes if prune.compensation is not None]

    @property
    def metrics_around(self) -> list[MetricRow]:
        """The validation metrics around each prune, and at the end, metric by metric."""
        rows = []
        for prune in (*self.history.prunes, *self.history.taken_back):
            when = str(prune.step)
            if prune.until is not None:
                when += ", taken back"
            for name in prune.metrics.names[:FEW]:
                around = prune.metrics
                values = [_number(of, name) for of in (around.before, around.uncompensated, around.after)]
                rows.append(MetricRow(name, when, *values))
        named = {row.name for row in rows}
        at_end = self.history.metrics_at_end
        rows += [MetricRow(name, "end", after=_number(at_end, name)) for name in sorted(named & at_end.keys())]
        return sorted(rows, key=lambda row: accuracies_first(row.name))

    @property
    def layers(self) -> list[LayerRow]:
        """The layers, in the order of the forward pass."""
        after = {layer.name: layer for layer in self.history.layers_after}
        return [LayerRow(layer, after.get(layer.name, layer)) for layer in self.history.layers_before]

    @property
    def widest(self) -> int:
        """The channels of the group that has most."""
        return max(self.history.groups.values(), default=1)

    @property
    def most_flops(self) -> float:
        """The FLOPs of the layer that has most."""
        return _greatest([layer.flops for layer in self.history.layers_before])

    @property
    def most_ms(self) -> float:
        """The milliseconds of the layer that takes longest, before or after."""
        layers = [*self.history.layers_before, *self.history.layers_after]
        return _greatest([layer.ms for layer in layers if layer.ms is not None])

    @property
    def unprunable(self) -> dict[str, list[str]]:
        """The layers that cannot be pruned, with their number of channels, by reason."""
        layers = defaultdict(list)
        for name, (channels, reason) in self.history.unprunable.items():
            layers[reason].append(f"{name} ({channels})")
        return layers


def _told_before(before: Measurement, metric: str) -> str:
    if metric not in before.metrics:
        return ""
    return f"{before.metrics[metric]:.4f} before the first prune"


def _number(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else ""


def _greatest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=1.0)


def _share(value: float, longest: float) -> str:
    """Return how much of the longest bar one takes, in percent; none if that is no number."""
    share = 100 * value / longest if longest else 0.0
    return f"{min(max(share, 0.0), 100.0):.1f}" if math.isfinite(share) else "0.0"


def _fraction(value: Any) -> str:
    is_number = isinstance(value, int | float) and abs(value) < 1e9
    return f"{value:.3f}" if is_number else str(value)


def _speed_tile(speed: Speed | None) -> Tile:
    """Return the tile of a speed, which is told with its quartiles or not at all."""
    name = "as fast, measured in turns"
    if speed is None:
        return Tile(name, "not known", "before and after are timed in turns at the end of training")
    number = speed.times_as_fast.partition(" ")[0] or "no difference"
    times = f"{speed.spread_before} ms → {speed.spread_after} ms"
    return Tile(name, number, f"{times}; {speed.how}")


def _percent(kept: float, original: float) -> str:
    return f"{kept / max(original, 1):.1%}"
