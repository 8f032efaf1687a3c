"""Figures for TensorBoard; needs matplotlib."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_prune.reporting.history import History

__all__ = ["metric_against_flops", "widths"]

ORIGINAL, KEPT = "#c9ced6", "#2f6fdb"
_MOST_ROWS = 60  # of more, names can no longer be read


def widths(history: History) -> Figure:
    """Draw the original width of each group and what is kept of it, in the order of the forward pass.

    Args:
        history: The history of a run.
    """
    now = history.widths
    rows = list(history.groups.items())[:_MOST_ROWS]
    figure = Figure(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [size for _, size in rows], color=ORIGINAL, label="original")
    axes.barh(places, [now[name] for name, _ in rows], color=KEPT, height=0.5, label="kept")
    axes.set_yticks(places, [f"{name}  {now[name]}/{size}" for name, size in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels")
    left_out = len(history.groups) - len(rows)
    axes.set_title(
        f"the first {len(rows)} of {len(history.groups)} groups" if left_out else "channels of each group", loc="left"
    )
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
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
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(left, values, color=ORIGINAL, linewidth=1, zorder=1)
    drawn = axes.scatter(left, values, c=[each["epoch"] for each in epochs], cmap="viridis", s=22, zorder=2)
    figure.colorbar(drawn, label="epochs trained")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    return figure
