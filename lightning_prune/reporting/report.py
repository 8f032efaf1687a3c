"""The report of a run: one HTML page that tells what pruning asked for, what it did, and what it cost."""

import json
import os
from collections import defaultdict
from html import escape
from pathlib import Path

from lightning_prune.reporting.charts import Mark, line_chart, paired_bar, table
from lightning_prune.reporting.history import History, read_histories
from lightning_prune.reporting.page import page, section
from lightning_prune.reporting.summary import Measurement

__all__ = ["render", "write_report"]

_KEY = '<span class="key" style="background:var(--before)"></span>before <span class="key" '
_KEY += 'style="background:var(--after)"></span>after'


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: The folder of the run, such as ``logs/quickstart/version_0``.
        out: The file to write; default ``report.html`` in that folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no such run, no pruning callback wrote into it, or there is no folder for the
            file.
        ValueError: If the history in it is damaged, or of a newer format.
    """
    run = Path(run)
    histories = read_histories(run)
    path = Path(out) if out is not None else run / "report.html"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r}: make it first.")
    config = run / "config.yaml"
    text = render(histories, str(run), config.read_text() if config.is_file() else "")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(histories: list[History], name: str, config: str = "") -> str:
    """Write the report as HTML.

    Args:
        histories: The histories of the run, one for each pruning callback.
        name: Name of the run.
        config: The config of the run, as text; without it the settings of the callbacks are shown alone.
    """
    parts = [part for history in histories for part in _about(history, name)]
    settings = {_title(history): history.settings for history in histories}
    shown = [f"<pre>{escape(json.dumps(settings, indent=2))}</pre>"]
    if config:
        shown.append(f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
    return page(f"{name}: pruning report", [*parts, section("Settings", *shown)])


def _about(history: History, name: str) -> list[str]:
    parts = [
        f'<h1>{escape(_title(history))}</h1><p class="soft">{escape(name)} · {escape(history.model)}</p>',
        _tiles(history.before, history.last, history.shown_metric),
        section("Over the schedule", _schedule(history)),
        section("Asked and achieved", _prunes(history)),
        section("Widths", _widths(history)),
        section("Where FLOPs and time went", _layers(history)),
    ]
    if history.held:
        parts.append(section("What stays whole, and why", _held(history)))
    return parts


def _title(history: History) -> str:
    pruned = history.module or history.model.rpartition(".")[2]
    return f"{pruned} pruned by {history.callback}"


def _tiles(before: Measurement, after: Measurement, metric: str) -> str:
    told = [
        (f"{_percent(after.flops, before.flops)}", "of the FLOPs", f"{before.flops:,} → {after.flops:,}"),
        (f"{_percent(after.params, before.params)}", "of the parameters", f"{before.params:,} → {after.params:,}"),
        (
            f"{before.latency_ms / after.latency_ms:.2f}x",
            "as fast, measured",
            f"{before.latency_ms:.2f} ms → {after.latency_ms:.2f} ms",
        ),
    ]
    if metric in after.metrics:
        was = f"{before.metrics[metric]:.4f} before the first prune" if metric in before.metrics else ""
        told.append((f"{after.metrics[metric]:.4f}", metric, was))
    tiles = [
        f'<div class="tile"><span>{escape(what)}</span><strong>{number}</strong><span>{escape(how)}</span></div>'
        for number, what, how in told
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _schedule(history: History) -> str:
    marks = [
        (
            float(prune.epoch),
            f"prune {prune.step}: {_percent(prune.left.flops, history.before.flops)} of the FLOPs left",
        )
        for prune in history.prunes
    ]
    charts = [_chart("FLOPs left", _flops_left(history), marks)]
    for metric in history.metrics:
        points = [(each["epoch"], each[metric]) for each in history.epochs if metric in each]
        charts.append(_chart(metric, points, marks))
    shown, hidden = charts[:2], charts[2:]
    if hidden:
        shown.append(f"<details><summary>{len(hidden)} more</summary>{''.join(hidden)}</details>")
    return '<p class="soft">Dashed lines are prunes.</p>' + "".join(shown)


def _chart(name: str, points: list[tuple[float, float]], marks: list[Mark]) -> str:
    return f'<div class="wide">{line_chart(name, points, marks)}</div>'


def _flops_left(history: History) -> list[tuple[float, float]]:
    """Return the corners of the line that goes down at each prune."""
    corners, left = [(0.0, 1.0)], 1.0
    for prune in history.prunes:
        corners.append((float(prune.epoch), left))
        left = prune.left.flops / max(history.before.flops, 1)
        corners.append((float(prune.epoch), left))
    end = max([corners[-1][0], *(each["epoch"] for each in history.epochs)])
    return [*corners, (end, left)]


def _prunes(history: History) -> str:
    if not history.prunes:
        return '<p class="soft">Nothing has been pruned yet.</p>'
    budgets = ("asked", "reachable", "rounded", "achieved")
    head = ["prune", "before epoch", "metric", *budgets, "parameters", "FLOPs", "ms"]
    rows = []
    for prune in history.prunes:
        fractions = [f"{prune.budget[name]:.3f}" if name in prune.budget else "" for name in budgets]
        left = prune.left
        numbers = [f"{left.params:,}", f"{left.flops:,}", f"{left.latency_ms:.2f}"]
        rows.append([str(prune.step), str(prune.epoch), escape(prune.budget.get("metric", "")), *fractions, *numbers])
    return (
        '<p class="soft">Fractions of the original. Reachable is the least that the settings allow; rounded is what '
        "whole steps of channels came to, before the rest of the budget was given back.</p>"
    ) + table(head, rows)


def _widths(history: History) -> str:
    longest = max(history.groups.values(), default=1)
    now = history.widths
    rows = [
        [
            escape(name),
            paired_bar(size, now[name], longest, f"{name}: {now[name]} of {size} channels"),
            f'<span class="figure">{now[name]} of {size}</span>',
        ]
        for name, size in history.groups.items()
    ]
    return f'<p class="soft">Channels of each group, from input to output. {_KEY}</p>' + table(
        ["group", "", "channels"], rows, "bars"
    )


def _layers(history: History) -> str:
    after = {layer.name: layer for layer in history.layers_after or history.layers_before}
    most_flops = max((layer.flops for layer in history.layers_before), default=1)
    most_time = max((layer.ms for layer in [*history.layers_before, *after.values()]), default=1)
    rows = []
    for was in history.layers_before:
        now = after.get(was.name, was)
        flops = (
            f"{was.name}: {was.flops:,.0f} → {now.flops:,.0f} FLOPs, {was.params:,.0f} → {now.params:,.0f} parameters"
        )
        time = f"{was.name}: {was.ms:.3f} → {now.ms:.3f} ms"
        rows.append(
            [
                escape(was.name),
                paired_bar(was.flops, now.flops, most_flops, flops),
                paired_bar(was.ms, now.ms, most_time, time),
                f'<span class="figure">{was.ms:.3f} → {now.ms:.3f}</span>',
            ]
        )
    return (f'<p class="soft">Each layer; time runs from its start to the start of the next one. {_KEY}</p>') + table(
        ["layer", "FLOPs", "time", "ms"], rows, "bars"
    )


def _held(history: History) -> str:
    alike: dict[str, list[str]] = defaultdict(list)
    for name, (channels, reason) in history.held.items():
        alike[reason].append(f"{escape(name)} ({channels})")
    rows = [["<br>".join(names), escape(reason)] for reason, names in alike.items()]
    return table(["layer (channels)", "reason"], rows, "words")


def _percent(part: float, whole: float) -> str:
    return f"{part / max(whole, 1):.1%}"
