"""What the first page shows: a picture and a table, from the same files as the page of results."""

import hashlib
import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stored
from result_files import RESULTS, Figures, Values
from torch import nn

from lightning_prune.models import build_network

README = Path(__file__).parents[1] / "README.md"
PICTURE = "first_page.svg"
BEGIN, END = "<!-- results: written by benchmarks/render_results.py -->\n", "<!-- end of results -->\n"
NETWORK, RECORD = "resnet20", "resnet20 | coherent OBS, refit | 0"  # whose widths are shown
WHOLE = "not pruned"
OURS = "lightning-prune"
DRAWN = {  # rows of the fine-tuned accuracy, by what they are called, with their colours
    "coherent OBS, refit, distilled": (OURS, "#0072b2"),
    "Torch-Pruning, statistics, distilled": ("Torch-Pruning, group norm", "#d55e00"),
    "Torch-Pruning, uniform, statistics, distilled": ("Torch-Pruning, uniform", "#e69f00"),
}
STAGES = {  # title: the column of the accuracy, our row, rows of the rival
    "right after the prune, without training": (
        "right after (%)",
        "coherent OBS, refit",
        ["Torch-Pruning, group norm, statistics", "Torch-Pruning, group norm, uniform, statistics"],
    ),
    "after fine-tuning, all at the same cost": (
        "fine-tuned (%)",
        "coherent OBS, refit, distilled",
        ["Torch-Pruning, statistics, distilled", "Torch-Pruning, uniform, statistics, distilled"],
    ),
}
Point = tuple[float, float, float]  # time kept, accuracy, its standard deviation, in percent


@dataclass(frozen=True)
class Picture:
    """The figure of the first page.

    Attributes:
        widths: (before, after) by layer.
        points: By row, a point for each budget, the quickest first.
        whole: Accuracy in percent of the network that is not pruned.
    """

    widths: dict[str, tuple[int, int]]
    points: dict[str, list[Point]]
    whole: float

    @property
    def file(self) -> str:
        """Name of the file."""
        return PICTURE

    @property
    def digest(self) -> str:
        """What a file that shows this holds, and no other."""
        content = [self.widths, self.points, self.whole]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def draw(self) -> bytes:
        """Return the figure as SVG."""
        import matplotlib
        from matplotlib.figure import Figure

        style = {"svg.hashsalt": "first page", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(9.6, 3.9), layout="constrained", facecolor="white")
            [left, right] = figure.subplots(1, 2)
            self._draw_widths(left)
            self._draw_points(right)
            drawn = io.BytesIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": self.digest})
            return drawn.getvalue()

    def _draw_widths(self, panel: Any) -> None:
        names = list(self.widths)
        places = range(len(names))
        panel.barh(places, [before for before, _ in self.widths.values()], color="#d9d9d9", label="before")
        panel.barh(places, [after for _, after in self.widths.values()], color="#0072b2", label="after")
        panel.set_yticks(places, names, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel("channels")
        panel.set_title("ResNet-20 at half the FLOPs", fontsize=10)
        panel.legend(frameon=False)

    def _draw_points(self, panel: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        panel.axhline(self.whole, color="#888888", linestyle="--", linewidth=1)
        panel.annotate(
            WHOLE, (0.01, self.whole), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            color="#666666", fontsize=8,
        )  # fmt: skip
        for row, (name, colour) in DRAWN.items():
            if times := [point[0] for point in self.points[row]]:
                accuracies = [point[1] for point in self.points[row]]
                deviations = [point[2] for point in self.points[row]]
                panel.errorbar(times, accuracies, deviations, label=name, color=colour, marker="o", capsize=2)
        panel.set_xlabel("measured time of a forward pass, of that of the whole network")
        panel.set_ylabel("test accuracy (%)")
        panel.set_title("CIFAR-10 (JPEG copy), fine-tuned at equal cost", fontsize=10)
        panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.legend(frameon=False, loc="lower right")


def picture(finetuned: Figures, folder: Path = RESULTS) -> Picture:
    """Return what is to be drawn.

    Args:
        finetuned: What `criteria_finetune.json` holds.
        folder: Where the file lies that has the widths.
    """
    after = stored.load(folder / "compensation.json")[RECORD]["widths"]
    layers = dict(build_network(NETWORK).named_modules())
    widths = {name: (_channels(layers[name]), width) for name, width in after.items()}
    settings = [rows for setting, rows in finetuned.items() if setting.partition(", keep ")[0] == NETWORK]
    points = {row: sorted(_point(rows[row]) for rows in settings if row in rows) for row in DRAWN}
    return Picture(widths, points, _mean(finetuned[NETWORK][WHOLE]["fine-tuned (%)"]))


def _channels(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv2d)
    return layer.out_channels


def _point(columns: dict[str, Values]) -> Point:
    accuracies = columns["fine-tuned (%)"]
    deviation = statistics.stdev(accuracies.values()) if len(accuracies) > 1 else 0.0
    return round(_mean(columns["time kept (%)"]), 3), round(_mean(accuracies), 3), round(deviation, 3)


def _mean(values: Values) -> float:
    return statistics.fmean(values.values())


def table(after: Figures, finetuned: Figures, networks: dict[str, str]) -> str:
    """Return accuracies at half the FLOPs, beside those of the better of the rival's forms.

    Args:
        after: What `compensation.json` holds.
        finetuned: What `criteria_finetune.json` holds.
        networks: The name of each network, by its setting in the files.
    """
    head = "| test accuracy (%) at half the FLOPs | not pruned | lightning-prune | Torch-Pruning |"
    lines = [head, "| --- " * 4 + "|"]
    for network, name in networks.items():
        whole = _shown(after[network][WHOLE]["right after (%)"])
        for (title, (column, ours, rivals)), figures in zip(STAGES.items(), (after, finetuned), strict=True):
            found = figures[network]
            known = [found[row][column] for row in rivals if row in found]
            best = _shown(max(known, key=_mean)) if known else "not run"
            lines.append(f"| {name}, {title} | {whole} | **{_shown(found[ours][column])}** | {best} |")
    return "\n".join(lines) + "\n"


def _shown(values: Values) -> str:
    return stored.spread(list(values.values()), 1)


def with_table(page: str, lines: str) -> str:
    """Return a page with a table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + "\n" + lines + "\n" + END + behind
