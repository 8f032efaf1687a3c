"""Figures for TensorBoard; needs matplotlib."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_prune.reporting.history import History

__all__ = ["metric_against_flops", "widths"]

ORIGINAL, KEPT = "#c9ced6", "#2f6fdb"
_MOST_ROWS = 60  # of more, names can no longer be read
_WIDTH = 4.5  # inches: TensorBoard shows figures small at first, and text is to be read even then


def widths(history: History) -> Figure:
    """Draw the original width of each group and what is kept of it, in the order of the forward pass.

    Args:
        history: The history of a run.
    """
    now = history.widths
    rows = list(history.groups.items())[:_MOST_ROWS]
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [size for _, size in rows], height=0.4, color=ORIGINAL, label="original")
    axes.barh(places, [now[name] for name, _ in rows], height=0.4, color=KEPT, label="kept")
    for place, (name, size) in enumerate(rows):  # above the bar: beside it, long names would leave it no room
        axes.text(0, place - 0.26, f"{name}  {now[name]}/{size}", fontsize=9, verticalalignment="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.6, -0.9)
    left_out = len(history.groups) - len(rows)
    axes.set_xlabel(f"channels of the first {len(rows)} of {len(history.groups)} groups" if left_out else "channels")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def metric_against_flops(history: History, metric: str) -> Figure:
    """Draw a metric against the FLOPs that were left when it was measured, from validation to validation.

    Args:
        history: The history of a run.
        metric: Name of a metric in ``history.epochs``.
    """
    epochs = [each for each in history.epochs if metric in each]
    left, values = ([each[name] for each in epochs] for name in ("keep_flops", metric))
    figure = Figure(figsize=(_WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(left, values, color=ORIGINAL, linewidth=1, zorder=1)
    drawn = axes.scatter(left, values, c=[each["epoch"] for each in epochs], cmap="viridis", s=22, zorder=2)
    figure.colorbar(drawn, label="epochs trained")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
