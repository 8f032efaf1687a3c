"""``lightning-prune compare A B ...``: runs, or checkpoints, side by side."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_prune.cli.benchmark import times
from lightning_prune.cli.loading import Loaded, add_loading_options, load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.graph import trace
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.spread import Spread
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.comparison import Column, column_of, read_run, side_by_side
from lightning_prune.reporting.measurement import measure
from lightning_prune.reporting.report import write_comparison
from lightning_prune.reporting.summary import aligned

__all__ = ["main"]

_ROUNDS = 9


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune compare``.

    Args:
        arguments: The command line after ``compare``.
    """
    parser = CommandParser(
        "lightning-prune compare",
        description="Compare runs by what they logged at their end, as a table and as one HTML page, or checkpoints by "
        "counting and timing them here and now; metrics are those of the last validation.",
    )
    parser.add_argument(
        "several",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="folders of runs, pruned or not, or checkpoints; two at least, and all are set beside the first",
    )
    parser.add_argument("--out", type=Path, help="page of the runs (default: compare.html in the first folder)")
    add_loading_options(parser)
    given = parser.parse_args(arguments)
    if len(given.several) < 2:
        parser.error("give two runs, or two checkpoints, at least")
    columns, note = _compared(given)
    for letter, path in zip(_letters(columns), given.several, strict=True):
        print(f"{letter}: {path}")
    print("", *aligned(side_by_side(columns)), "", note, sep="\n")


def _compared(given: argparse.Namespace) -> tuple[list[Column], str]:
    """Return the networks under short names, and a line to be printed below them."""
    folders = [path.is_dir() for path in given.several]
    if any(folders) and not all(folders):
        raise ValueError("A run and a checkpoint were not timed side by side: give two runs, or two checkpoints.")
    if all(folders):
        written = write_comparison(given.several, given.out)
        columns = [column_of(read_run(run)) for run in given.several]
        note = f"Written to {written}. Each run has timed its network against its own original, turn and turn about."
    else:
        columns = _measured([load_given(path, given) for path in given.several])
        note = f"Timed turn and turn about: median (quartiles) of {_ROUNDS} turns."
    named = zip(_letters(columns), columns, strict=True)
    return [replace(column, name=name) for name, column in named], note


def _letters(several: Sequence[object]) -> list[str]:
    """Return short names: A to Z, then numbers."""
    return [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(several))]


def _measured(checkpoints: list[Loaded]) -> list[Column]:
    """Count the models, and time them turn and turn about."""
    latencies = times([loaded.model for loaded in checkpoints], checkpoints[0].inputs, _ROUNDS)
    return [_measurement(loaded, Spread.of(latency)) for loaded, latency in zip(checkpoints, latencies, strict=True)]


def _measurement(loaded: Loaded, latency: Spread) -> Column:
    plan = plan_in_force(loaded.model)
    cost = CostModel(trace(loaded.model, loaded.inputs), "flops")
    flops = int(cost(plan.widths if plan is not None else {}))
    measured = measure(loaded.model, loaded.inputs, flops, latency)
    if loaded.histories:
        measured.metrics = loaded.histories[0].last.metrics
    return Column.of("", measured, latency)
