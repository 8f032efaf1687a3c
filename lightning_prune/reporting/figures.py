"""Figures for TensorBoard; needs matplotlib."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_prune.reporting.history import History

__all__ = ["metric_against_flops", "widths"]

ORIGINAL = "#c9ced6"
KEPT = "#2f6fdb"
_MOST_ROWS = 60  # of more, names can no longer be read
_WIDTH = 4.5  # inches: TensorBoard shows figures small at first, and text is to be read even then


def widths(history: History) -> Figure:
    """Draw the original width of each group and what is kept of it, in the order of the forward pass.

    Args:
        history: The history of a run.
    """
    names = list(history.groups)[:_MOST_ROWS]
    original = [history.groups[name] for name in names]
    kept = [history.widths[name] for name in names]
    rows = range(len(names))
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(rows, original, height=0.4, color=ORIGINAL, label="original")
    axes.barh(rows, kept, height=0.4, color=KEPT, label="kept")
    for row, name in enumerate(names):  # above the bar: beside it, long names would take all of its room
        label = f"{name}  {kept[row]}/{original[row]}"
        axes.text(0, row - 0.26, label, fontsize=9, verticalalignment="bottom", parse_math=False)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.6, -0.9)
    all_shown = len(names) == len(history.groups)
    axes.set_xlabel("channels" if all_shown else f"channels of the first {len(names)} of {len(history.groups)} groups")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _hide_frame(axes)
    return figure


def metric_against_flops(history: History, metric: str) -> Figure:
    """Draw a metric against the FLOPs that were kept when it was measured, from validation to validation.

    Args:
        history: The history of a run.
        metric: Name of a metric in ``history.epochs``.
    """
    validations = [each for each in history.epochs if math.isfinite(each.get(metric, math.nan))]
    kept = [validation["keep_flops"] for validation in validations]
    values = [validation[metric] for validation in validations]
    epochs = [validation["epoch"] for validation in validations]
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(kept, values, color=ORIGINAL, linewidth=1, zorder=1)
    drawn = axes.scatter(kept, values, c=epochs, cmap="viridis", s=22, zorder=2)
    figure.colorbar(drawn, label="epochs trained")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs kept")
    axes.set_ylabel(metric, parse_math=False)  # a dollar sign in a name is one
    axes.grid(alpha=0.3)
    _hide_frame(axes)
    return figure


def _hide_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
