"""``lightning-prune compare A B``: two runs, or two checkpoints, side by side."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.benchmark import times
from lightning_prune.cli.loading import Loaded, add_loading_options, load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.graph import trace
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.history import read_histories
from lightning_prune.reporting.measurement import Measurement, measure
from lightning_prune.reporting.summary import summarize

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune compare``.

    Args:
        arguments: The command line after ``compare``.
    """
    parser = CommandParser(
        "lightning-prune compare",
        description="Compare two runs by what they logged at their end, or two checkpoints by counting and timing them "
        "here and now; metrics are those of the last validation.",
    )
    parser.add_argument("a", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("b", type=Path, help="another of the same kind")
    add_loading_options(parser)
    given = parser.parse_args(arguments)
    if given.a.is_dir() != given.b.is_dir():
        raise ValueError("A run and a checkpoint were not timed side by side: give two runs, or two checkpoints.")
    note = ""
    if given.a.is_dir():
        note = "\nEach run measured its latency by itself, at its end; checkpoints are timed turn and turn about."
        first, second = (read_histories(run)[0].last for run in (given.a, given.b))
    else:
        first, second = _measured([load_given(path, given) for path in (given.a, given.b)])
    print(f"A: {given.a}\nB: {given.b}\n")
    print("\n".join([*summarize(first, second, ("A", "B")), note]).rstrip())


def _measured(checkpoints: list[Loaded]) -> list[Measurement]:
    """Count the models, and time them turn and turn about."""
    latencies = times([loaded.model for loaded in checkpoints], checkpoints[0].inputs, rounds=5)
    return [
        _measurement(loaded, statistics.median(latency)) for loaded, latency in zip(checkpoints, latencies, strict=True)
    ]


def _measurement(loaded: Loaded, latency_ms: float) -> Measurement:
    plan = plan_in_force(loaded.model)
    cost = CostModel(trace(loaded.model, loaded.inputs), "flops")
    flops = int(cost(plan.widths if plan is not None else {}))
    measured = measure(loaded.model, loaded.inputs, flops, latency_ms)
    if loaded.histories:
        measured.metrics = loaded.histories[0].last.metrics
    return measured
