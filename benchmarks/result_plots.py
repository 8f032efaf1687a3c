"""Draw accuracy against FLOPs and against measured time, one figure for each network of a file of results."""

import hashlib
import io
import json
import re
import statistics
from dataclasses import dataclass
from typing import Any

from result_files import Figures

FLOPS, TIME, ACCURACY, WHOLE = "FLOPs kept (%)", "time kept (%)", "fine-tuned (%)", "not pruned"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4fc9", "#4d4d4d", "#9c7a00", "#c0303c")
MARKERS = "osD^vP*Xph"
Point = tuple[float, ...]  # what it is drawn along, mean and standard deviation of the accuracy


@dataclass(frozen=True)
class Look:
    """How the networks of a file of results are drawn.

    Attributes:
        accuracy: The column of the accuracy.
        meaning: What that is.
        along: A panel for each column that it is drawn against, with its title.
        prefix: What names of files begin with.
        budgets: A network that was measured at fewer is not drawn.
    """

    accuracy: str
    meaning: str
    along: dict[str, str]
    prefix: str
    budgets: int = 1


FINETUNED = Look(
    accuracy=ACCURACY,
    meaning="test accuracy after fine-tuning (%)",
    along={FLOPS: "FLOPs kept", TIME: "time of a forward pass kept"},
    prefix="accuracy",
)
PRUNED = Look(
    accuracy="right after (%)",
    meaning="test accuracy right after the prune, without training (%)",
    along={FLOPS: "FLOPs kept"},
    prefix="compensation",
    budgets=2,
)
LOOKS = {"criteria_finetune.json": FINETUNED, "compensation.json": PRUNED}


@dataclass(frozen=True)
class Plot:
    """What is drawn of a network.

    Attributes:
        network: Its name.
        points: By row of the table, a point for each budget that it was measured at, the smallest first.
        whole: Accuracy in percent of the network that is not pruned.
        look: How it is drawn.
    """

    network: str
    points: dict[str, list[Point]]
    whole: float
    look: Look = FINETUNED

    @property
    def all_points(self) -> list[Point]:
        """The points of all rows."""
        return [point for points in self.points.values() for point in points]

    @property
    def floor(self) -> float:
        """Accuracy below which nothing is shown: a row that fails would press all others together."""
        middle = statistics.median(point[-2] for point in self.all_points)
        return middle - 3 * max(1.0, abs(self.whole - middle))

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.look.prefix}_{re.sub(r'[/ ,]+', '-', self.network)}.svg"

    @property
    def digest(self) -> str:
        """What a file that shows these points holds, and no other; the same for all versions of Matplotlib."""
        return hashlib.sha256(json.dumps([self.points, self.whole]).encode()).hexdigest()


def plots(figures: Figures, rows: list[str], look: Look = FINETUNED) -> list[Plot]:
    """Return what is to be drawn: networks of which the whole network and some of the rows have been measured."""
    networks = dict.fromkeys(setting.partition(", keep ")[0] for setting in figures)
    found = []
    for network in networks:
        settings = [each for each in figures if each.partition(", keep ")[0] == network]
        points = {
            row: sorted(_point(figures[each][row], look) for each in settings if _drawable(figures[each], row, look))
            for row in rows
        }
        budgets = max(map(len, points.values()), default=0)
        if budgets >= look.budgets and WHOLE in figures.get(network, {}):
            whole = statistics.fmean(figures[network][WHOLE][look.accuracy].values())
            found.append(Plot(network, points, whole, look))
    return found


def _drawable(rows: dict[str, dict[str, dict[str, float]]], row: str, look: Look) -> bool:
    return {*look.along, look.accuracy} <= set(rows.get(row, {}))


def _point(columns: dict[str, dict[str, float]], look: Look) -> Point:
    along = [statistics.fmean(columns[column].values()) for column in look.along]
    accuracy = list(columns[look.accuracy].values())
    deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
    return tuple(round(value, 6) for value in (*along, statistics.fmean(accuracy), deviation))


def draw(plot: Plot) -> bytes:
    """Return the figure as SVG, the same bytes for the same points and version of Matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": plot.network, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        titles = plot.look.along.values()
        figure = Figure(figsize=(4.5 + 2.25 * len(titles), 5.4), layout="constrained", facecolor="white")
        [panels] = figure.subplots(1, len(titles), sharey=True, squeeze=False)
        for place, title in enumerate(titles):
            _panel(panels[place], plot, place)
            panels[place].set_xlabel(title)
        panels[0].set_ylabel(plot.look.meaning)
        panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], plot.floor))
        figure.suptitle(f"{plot.network}, CIFAR-10 (JPEG copy); mean and standard deviation over seeds", fontsize=10)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": plot.digest})
        return drawn.getvalue()


def _panel(panel: Any, plot: Plot, place: int) -> None:
    """Draw accuracy against what stands at one place of the points."""
    from matplotlib.ticker import PercentFormatter

    panel.axhline(plot.whole, color="#888888", linestyle="--", linewidth=1)
    panel.annotate(
        WHOLE, (0.01, plot.whole), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        color="#666666", fontsize=8,
    )  # fmt: skip
    for number, (row, points) in enumerate(plot.points.items()):
        if points:  # a row that is left out keeps its colour for other figures
            below = " (below)" if max(point[-2] for point in points) < plot.floor else ""
            panel.errorbar(
                [point[place] for point in points], [point[-2] for point in points], [point[-1] for point in points],
                label=row + below, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                markersize=5, linewidth=1, capsize=2, elinewidth=0.8,
            )  # fmt: skip
    kept = [point[place] for point in plot.all_points]
    panel.set_xlim(max(0, min(kept) - 10), max(100, max(kept) + 5))
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
