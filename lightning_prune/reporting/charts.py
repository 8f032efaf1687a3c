"""Charts as HTML and SVG text that need no script and no network; colours come from the page's style."""

import math
from collections.abc import Sequence
from html import escape

__all__ = ["Mark", "line_chart", "paired_bar", "table"]

WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 22, 30

Mark = tuple[float, str]  # a place on the x axis, and what happened there


def line_chart(
    name: str, points: Sequence[tuple[float, float]], marks: Sequence[Mark] = (), across: str = "epochs trained"
) -> str:
    """Draw a line through points, with vertical lines where something happened.

    Args:
        name: What the y axis shows.
        points: (x, y), ascending in x; at least one.
        marks: Where something happened, and what.
        across: What the x axis shows.

    Returns:
        An ``<svg>`` element.

    Example:
        >>> drawn = line_chart("accuracy", [(1, 0.5), (2, 0.75)], [(1, "prune 1")])
        >>> drawn.count("<circle"), drawn.count('class="mark"')
        (2, 1)
    """
    x_ticks = _ticks(min(0.0, points[0][0]), max([points[-1][0], *(x for x, _ in marks)]), 10, whole=True)
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points), 5)
    across_span, up_span = x_ticks[-1] - x_ticks[0], y_ticks[-1] - y_ticks[0]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_ticks[0]) / across_span * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_ticks[0]) / up_span * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    for y in y_ticks:
        _, height = place(x_ticks[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in x_ticks:
        left, _ = place(x, y_ticks[0])
        parts.append(f'<text class="tick" x="{left:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{x:.6g}</text>')
    for x, text in marks:
        left, _ = place(x, y_ticks[0])
        parts.append(
            f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(text)}</title></line>"
        )
    placed = [place(x, y) for x, y in points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
    for (x, y), (left, height) in zip(points, placed, strict=True):
        parts.append(
            f'<circle class="point" cx="{left:.1f}" cy="{height:.1f}" r="3">'
            f"<title>{x:g} {escape(across)}: {y:.6g}</title></circle>"
        )
    parts.append(f'<text class="name" x="{LEFT}" y="13">{escape(name)}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="13" text-anchor="end">{escape(across)}</text></svg>')
    return "".join(parts)


def _ticks(least: float, most: float, count: int, whole: bool = False) -> list[float]:
    """Return round numbers at equal distances around a range."""
    span = most - least
    if span <= 1e-9 * max(abs(least), abs(most)) or span < 1e-100:  # as good as one value
        span = max(abs(least), abs(most)) if max(abs(least), abs(most)) > 1e-100 else 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def paired_bar(before: float, after: float, longest: float, told: str) -> str:
    """Draw one bar within another: what there was, and what is left of it.

    Args:
        before: Length of the outer bar.
        after: Length of the inner bar.
        longest: The length that fills the width.
        told: What is told where the mouse points.

    Returns:
        A ``<div>`` element.

    Example:
        >>> paired_bar(8, 4, 16, "4 of 8")
        '<div class="bar" title="4 of 8"><i style="width:50.0%"></i><b style="width:25.0%"></b></div>'
    """
    outer, inner = (100 * length / longest if longest else 0.0 for length in (before, after))
    return (
        f'<div class="bar" title="{escape(told)}"><i style="width:{outer:.1f}%"></i>'
        f'<b style="width:{inner:.1f}%"></b></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """Write a table.

    Args:
        head: Names of the columns, as text.
        rows: The cells, as HTML.
        kind: Class of the table in the page's style.

    Returns:
        A ``<table>`` element.

    Example:
        >>> table(["a"], [["<b>1</b>"]])
        '<div class="wide"><table class="numbers"><tr><th>a</th></tr><tr><td><b>1</b></td></tr></table></div>'
    """
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}">{body}</table></div>'
