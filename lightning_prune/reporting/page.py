"""The frame of a report: one HTML page without scripts, in the colours that the reader's system prefers."""

from collections.abc import Sequence
from html import escape

__all__ = ["page", "section"]

STYLE = """
:root { color-scheme: light dark; --page: #f7f8fa; --card: #ffffff; --text: #1c2230; --soft: #626b7b; --rule: #e3e6ec;
  --before: #d3d9e3; --after: #2f6fdb; --mark: #d9730d; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --text: #e7eaf0; --soft: #97a1b3;
  --rule: #2c333f; --before: #3b4453; --after: #6ea1ff; --mark: #ffa657; --good: #56d392; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.1rem 1.25rem;
  margin-top: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin-top: 1.25rem; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .8rem 1rem; }
.tile strong { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: .8rem; text-align: left; }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.numbers th + th, .numbers td + td { text-align: right; }
.bars td:first-child, .words td:first-child { font: 12.5px ui-monospace, monospace; }
.words td:first-child { overflow-wrap: anywhere; } .bars td:not(:has(.bar)) { width: 1%; white-space: nowrap; }
.bars td { border: 0; padding-block: .1rem; } .bars .figure { font-size: .85rem; }
.bar { position: relative; height: 12px; min-width: 8rem; }
.bar i, .bar b { position: absolute; left: 0; top: 0; height: 100%; border-radius: 3px; }
.bar i { background: var(--before); } .bar b { background: var(--after); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin: 0 .3em 0 .8em; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; margin-top: .5rem; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; } svg .tick { fill: var(--soft); font-size: 11px; }
svg .name { font-weight: 600; } .grid { stroke: var(--rule); } .mark { stroke: var(--mark); stroke-dasharray: 4 3; }
.line { fill: none; stroke: var(--after); stroke-width: 2; } .point { fill: var(--after); }
details summary { cursor: pointer; color: var(--soft); margin-top: .5rem; }
pre { overflow-x: auto; font: 12.5px/1.45 ui-monospace, monospace; margin: .5rem 0 0; }
@media print { section, .tile { break-inside: avoid; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Write a page.

    Args:
        title: What the browser shows as its name, as text.
        parts: What the page holds, as HTML.
    """
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Write a part of a page.

    Args:
        title: Its headline, as text.
        parts: What it holds, as HTML.

    Example:
        >>> section("Widths", "<p>8</p>")
        '<section><h2>Widths</h2><p>8</p></section>'
    """
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"
