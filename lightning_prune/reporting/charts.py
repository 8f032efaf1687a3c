"""Line charts: where ticks, points and marks lie; the templates draw them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HEIGHT", "LEFT", "WIDTH", "LineChart", "Mark", "Point", "line_chart"]

# All in pixels; the lines lie within margins.
WIDTH = 720
HEIGHT = 220
LEFT = 56
RIGHT = 12
TOP = 22
BOTTOM = 30
_ENDLESS = 1e300  # beyond it distances are no longer finite


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        x: Where it was measured, on the x axis.
        y: The value.
        left: Pixels from the left edge of the chart.
        top: Pixels from its upper edge.
    """

    x: float
    y: float
    left: float
    top: float


@dataclass(frozen=True)
class Mark:
    """Something that happened.

    Attributes:
        x: Where on the x axis.
        text: What.
    """

    x: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis: round numbers at equal distances, and where they lie.

    Attributes:
        ticks: The numbers, ascending.
        first: Pixel of the first one.
        last: Pixel of the last one.
    """

    ticks: Sequence[float]
    first: float
    last: float

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        lowest, highest = self.ticks[0], self.ticks[-1]
        share = (value - lowest) / (highest - lowest)
        length = self.last - self.first
        return self.first + share * length


@dataclass(frozen=True)
class LineChart:
    """A line through points, with vertical lines where something happened.

    Attributes:
        name: What the y axis shows.
        across: What the x axis shows.
        x: The x axis.
        y: The y axis.
        points: The points, from left to right.
        marks: What happened.
        missing: How many points are left out, as they are not finite.
    """

    name: str
    across: str
    x: Scale
    y: Scale
    points: Sequence[Point]
    marks: Sequence[Mark]
    missing: int = 0
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    name: str,
    values: Sequence[tuple[float, float]],
    marks: Sequence[Mark] = (),
    across: str = "epochs trained",
    beside: Sequence[float] = (),
) -> LineChart:
    """Lay out a line chart.

    Args:
        name: What the y axis shows.
        values: (x, y), ascending in x; those that are not finite are left out.
        marks: Where something happened, and what.
        across: What the x axis shows.
        beside: What other charts show upwards, for a y axis that is the same in all.

    Example:
        >>> chart = line_chart("accuracy", [(1, 0.5), (2, 0.75)], [Mark(1, "prune 1")])
        >>> chart.x.ticks
        [0.0, 1.0, 2.0]
        >>> [round(point.left) for point in chart.points]
        [382, 708]
    """
    drawn = [(x, y) for x, y in values if abs(x) < _ENDLESS and abs(y) < _ENDLESS]  # which NaN is not
    xs = [x for x, _ in drawn]
    ys = [*(y for _, y in drawn), *(y for y in beside if abs(y) < _ENDLESS)] or [0.0]
    begin = min([0.0, *xs])
    end = max([begin, *xs, *(mark.x for mark in marks)])
    x_axis = Scale(
        ticks=_ticks(begin, end, 10, least_step=1.0),
        first=LEFT,
        last=WIDTH - RIGHT,
    )
    y_axis = Scale(
        ticks=_ticks(min(ys), max(ys), 5),
        first=HEIGHT - BOTTOM,
        last=TOP,
    )
    points = [Point(x, y, left=x_axis.place(x), top=y_axis.place(y)) for x, y in drawn]
    return LineChart(name, across, x_axis, y_axis, points, marks, missing=len(values) - len(drawn))


def _ticks(least: float, most: float, count: int, least_step: float = 0.0) -> list[float]:
    """Return round numbers at equal distances around a range, about as many as asked for."""
    largest = max(abs(least), abs(most))
    span = most - least
    if span <= 1e-9 * largest or span < 1e-100:  # as good as one value
        span = largest if largest > 1e-100 else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    steps = [factor * power for factor in (1, 2, 5, 10)]
    step = max(least_step, next(step for step in steps if span / step <= count))
    first = math.floor(least / step + 1e-9)
    last = math.ceil(most / step - 1e-9)
    numbers = range(first, max(last, first + 1) + 1)
    return [number * step for number in numbers]
