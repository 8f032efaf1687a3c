"""Latency tables: what another runtime, or another machine, has measured of a network, as a cost that budgets go by."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.graph.channel_graph import ChannelGraph, Term
from lightning_prune.plain import MisfitError, made
from lightning_prune.planning.cost import integers
from lightning_prune.planning.profiling import fitted
from lightning_prune.planning.segments import Segment

__all__ = ["TABLE", "VERSION", "LatencyTable", "read_table", "table_from", "table_of", "use_table"]

VERSION = 1  # of packs and tables
TABLE = "latency_table"
"""Name of the metric that goes by a table, in `lightning_prune.planning.METRICS` and in the terms of a graph."""


@dataclass
class LatencyTable:
    """What was measured of a network at several widths.

    Attributes:
        version: Of the format.
        runtime: What it ran in.
        machine: What it ran on, in words.
        groups: Original number of channels, by group name.
        samples: Channels by group name, of each network that was timed.
        times: Milliseconds by module, of each of them.
    """

    version: int
    runtime: str
    machine: list[Any]
    groups: dict[str, int]
    samples: list[dict[str, int]]
    times: list[dict[str, float]]


def read_table(path: str | Path) -> LatencyTable:
    """Read a table.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no table, or one of a newer format.
    """
    return table_of(table_from(path))


def table_from(path: str | Path) -> Any:
    """Return what is in the file of a table as plain values, checked as `read_table` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no latency table at {str(path)!r}.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        table_of(content)
    except (MisfitError, UnicodeDecodeError, json.JSONDecodeError) as raised:
        raise ValueError(f"{str(path)!r} is no latency table, as `lightning-prune profile` prints it.") from raised
    return content


def table_of(content: Any) -> LatencyTable:
    """Return the table that plain values hold; raise a ValueError if they hold none."""
    table: LatencyTable = made(LatencyTable, content)
    if table.version > VERSION:
        raise ValueError("The latency table has a newer format: install a newer lightning-prune.")
    if not table.samples or len(table.samples) != len(table.times):
        raise MisfitError("times", "has not as many entries as samples")
    return table


def use_table(graph: ChannelGraph, table: LatencyTable) -> None:
    """Let budgets of a network go by a table: the time of each module is fitted as `profile` does it.

    Args:
        graph: The traced model; gets ``terms["latency_table"]``, in milliseconds.
        table: What was measured of it.

    Raises:
        ValueError: If the table is about another network.
    """
    groups = {name: group.size for name, group in graph.groups.items()}
    if groups != table.groups:
        raise ValueError(
            f"The latency table is about another network than {type(graph.model).__name__}: its groups are "
            f"{_told(table.groups)} where {_told(groups)} are expected; make one with `lightning-prune profile`."
        )
    tried = [integers(sample[name] for name in groups) for sample in table.samples]
    costly = {term.module for term in graph.terms["flops"]}
    merged = [_merged(times, costly) for times in table.times]
    terms: list[Term] = []
    for module in dict.fromkeys(name for times in merged for name in times):
        measured = np.array([times.get(module, 0.0) for times in merged])
        terms += fitted(graph, Segment(module, 0), measured, tried)
    graph.terms[TABLE] = terms


def _merged(times: Mapping[str, float], costly: set[str]) -> dict[str, float]:
    """Add the time of modules that say nothing of their widths to that of the one before."""
    merged: dict[str, float] = {}
    last = next((name for name in times if name in costly), "")
    for name, taken in times.items():
        last = name if name in costly else last
        merged[last] = merged.get(last, 0.0) + taken
    return merged


def _told(groups: Mapping[str, int]) -> str:
    several = [f"{name} ({size})" for name, size in groups.items()]
    return ", ".join([*several[:3], "..."] if len(several) > 3 else several) or "none"
