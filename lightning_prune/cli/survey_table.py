"""The survey of `plan` as text: methods by budgets, and the best network of each budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.reporting.summary import aligned
from lightning_prune.reporting.survey import Row, Survey, best_first, middle, shown_metric, speed_up

__all__ = ["told"]

_BAR = 40  # characters of the longest bar

Table = list[list[str]]


def told(survey: Survey, methods: Sequence[str], keeps: Sequence[float], settings: dict[str, Any]) -> list[str]:
    """Write a survey line by line: methods by budgets, and the best network of each budget.

    Args:
        survey: What was measured.
        methods: The methods that are shown.
        keeps: The budgets that are shown.
        settings: The settings of the rows that are shown.
    """
    shown = _Shown(survey, methods, keeps, settings)
    return [
        shown.headline,
        "",
        *aligned(shown.methods_by_budgets()),
        "",
        *shown.curve(),
        "",
        *aligned(shown.costs()),
        "",
        *aligned(shown.widths()),
        *shown.censuses(),
        *shown.refusals(),
    ]


@dataclass
class _Shown:
    """The part of a survey that is shown; the arguments are those of `told`."""

    survey: Survey
    methods: Sequence[str]
    keeps: Sequence[float]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows = []
        for row in self.survey.rows_of(self.settings):
            if row.method in self.methods and row.keep in self.keeps:
                self.rows.append(row)
        self.metric = shown_metric(self.rows)
        self.best = [self._best_at(keep) for keep in self.keeps]
        count = str(self.settings["validate_batches"])
        before = self.survey.before.get(count, {})
        self.before = before.get(self.metric)

    def _best_at(self, keep: float) -> Row:
        rows = [row for row in self.rows if row.keep == keep]
        return best_first(rows)[0]

    @property
    def headline(self) -> str:
        metric = self.metric or "no metric"
        line = f"{self.survey.model}, {metric} right after the compensated prune"
        if self.before is None:
            return line
        return f"{line} ({self.before:.4f} before)"

    def methods_by_budgets(self) -> Table:
        budgets = [f"keep {keep:g}" for keep in self.keeps]
        table = [["method", *budgets]]
        for method in self.methods:
            values = {}
            for row in self.rows:
                if row.method == method:
                    values[row.keep] = self._value(row)
            cells = [values.get(keep, "") for keep in self.keeps]
            table.append([method, *cells])
        return table

    def _value(self, row: Row) -> str:
        if self.metric not in row.metrics:
            return "-"
        return f"{row.metrics[self.metric]:.4f}"

    def curve(self) -> list[str]:
        """Draw the best network of each budget as a bar, the original being the longest where it is the best."""
        values = [row.metrics.get(self.metric, 0.0) for row in self.best]
        longest = max([*values, self.before or 0.0])
        lines = []
        for row, value in zip(self.best, values, strict=True):
            share = value / longest if longest > 0 else 0.0
            bar = "#" * max(0, round(_BAR * share))
            lines.append(f"{row.keep:5.2f}  {bar:{_BAR}}  {self._value(row)}  {row.method}")
        return lines

    def costs(self) -> Table:
        metric = self.settings["metric"]
        table = [["keep", f"kept {metric}", "FLOPs", "parameters", "ms", "speed-up (quartiles)"]]
        for row in self.best:
            cells = ["-"] * 5
            if not row.refusal:
                low, median, high = speed_up(row)
                milliseconds = middle(row.times[1])
                cells = [
                    f"{row.kept[metric]:.3f}",
                    f"{row.flops:,.0f}",
                    f"{row.params:,.0f}",
                    f"{milliseconds:.2f}",
                    f"{median:.2f}x ({low:.2f}-{high:.2f})",
                ]
            table.append([f"{row.keep:g}", *cells])
        return table

    def widths(self) -> Table:
        budgets = [f"{row.keep:g}" for row in self.best]
        table = [["channels of", "original", *budgets]]
        for group, size in self.survey.groups.items():
            kept = [row.widths.get(group, size) for row in self.best]
            table.append([group, str(size), *map(str, kept)])
        return table

    def censuses(self) -> list[str]:
        """Tell what searches have tried."""
        return [f"{row.method} at {row.keep:g}: {row.census}" for row in self.rows if row.census]

    def refusals(self) -> list[str]:
        places: dict[str, list[str]] = {}
        for row in self.rows:
            if row.refusal:
                of_reason = places.setdefault(row.refusal, [])
                of_reason.append(f"{row.method} at {row.keep:g}")
        return [f"not measured: {', '.join(rows)}: {reason}" for reason, rows in places.items()]
