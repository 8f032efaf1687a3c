"""``lightning-prune benchmark CKPT``: latency and throughput of a pruned model against the original."""

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lightning_prune.cli.loading import add_loading_options, load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.export import random_inputs
from lightning_prune.export.runtimes import RUNTIMES, Ready, ready_in
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.planning.timing import median_time, placed, run_times, times_in_turns
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.speed import Speed
from lightning_prune.reporting.summary import aligned
from lightning_prune.surgery import reshape

__all__ = ["main", "original_of", "times"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune benchmark``.

    Args:
        arguments: The command line after ``benchmark``.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.batch_sizes) < 1 or given.rounds < 1 or given.threads < 1:
        parser.error("batch sizes, rounds and threads must be at least 1")
    torch.set_num_threads(given.threads)
    loaded = load_given(given.checkpoint, given)
    device = _device(given.device)
    if given.runtime != "torch" and device.type != "cpu":
        raise ValueError(f"--runtime {given.runtime} runs on the CPU here: leave --device out.")
    models = [original_of(loaded.model).to(device), loaded.model.to(device)]
    with ExitStack() as folders:
        networks = [_ready(given.runtime, model, loaded.inputs, folders) for model in models]
        lines = _measured(networks, loaded.inputs, device, given)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {given.threads} threads"
    turns = f"median (quartiles) of {given.rounds} turns"
    print(f"{type(loaded.model).__name__} on {where}, {version_of(given.runtime)}; {turns}")
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "lightning-prune benchmark",
        description="Time a pruned model and its original in evaluation mode, turn and turn about.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a pruned model")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each model (default: 10)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument(
        "--runtime", choices=list(RUNTIMES), default="torch", help="what runs the networks (default: torch)"
    )
    add_loading_options(parser)
    return parser


def version_of(runtime: str) -> str:
    """Return the name of a runtime with its version."""
    return f"{runtime} {version(runtime)}" if runtime != "torch" else f"torch {torch.__version__}"


def _ready(runtime: str, model: nn.Module, inputs: Any, folders: ExitStack) -> Ready:
    folder = folders.enter_context(TemporaryDirectory(prefix="lightning-prune-"))
    return ready_in(runtime, model, inputs, Path(folder))


@torch.no_grad()
def _measured(
    networks: Sequence[Ready], example_inputs: Any, device: torch.device, given: argparse.Namespace
) -> list[str]:
    """Time both networks at each batch size, and return tables, line by line."""
    rows = [("batch", "original (ms)", "pruned (ms)", "speed-up", "original (1/s)", "pruned (1/s)")]
    runs_by_size = {}
    for size in given.batch_sizes:
        inputs = random_inputs(example_inputs, size)
        runs = _runs_in_turns([ready(inputs) for ready in networks], device, given.rounds)
        original, pruned = ([statistics.median(turn) for turn in turns] for turns in runs)
        rows.append(_row(size, original, pruned))
        runs_by_size[size] = [[taken for turn in turns for taken in turn] for turns in runs]
    return [*aligned(rows), "", *_scenarios(runs_by_size)]


def _scenarios(runs_by_size: Mapping[int, Sequence[Sequence[float]]]) -> list[str]:
    """Return a table of single runs: one sample after the other, and as many as there are in the largest batches."""
    rows = [("", "batch", "original p50 (ms)", "p90", "pruned p50 (ms)", "p90", "original (1/s)", "pruned (1/s)")]
    scenarios = {"offline": max(runs_by_size)}
    if 1 in runs_by_size:
        scenarios = {"single-stream": 1, **scenarios}
    for name, size in scenarios.items():
        cells: list[str] = []
        rates = []
        for runs in runs_by_size[size]:
            cells += [f"{_percentile(runs, 50):.3f}", f"{_percentile(runs, 90):.3f}"]
            rates.append(f"{1000 * size * len(runs) / sum(runs):,.0f}")
        rows.append((name, str(size), cells[0], cells[1], cells[2], cells[3], rates[0], rates[1]))
    return aligned(rows)


def _percentile(values: Sequence[float], percent: int) -> float:
    """Return the least of some values that at least so many percent of them are not above."""
    place = -(-len(values) * percent // 100) - 1
    return sorted(values)[place]


def _runs_in_turns(runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> list[list[list[float]]]:
    """Return the milliseconds of all runs of each network, turn by turn."""
    measured: list[list[list[float]]] = [[] for _ in runs]

    def turn(run: Callable[[], Any], turns: list[list[float]]) -> float:
        turns.append(run_times(run, device, milliseconds=100, most_runs=50))
        return sum(turns[-1])

    times_in_turns([partial(turn, run, turns) for run, turns in zip(runs, measured, strict=True)], rounds)
    return measured


def original_of(model: nn.Module) -> nn.Module:
    """Return a model of the original shape for a pruned one; the values are without meaning.

    Raises:
        ValueError: If the model was never pruned.
    """
    if plan_in_force(model) is None:
        raise ValueError(f"{type(model).__name__} was never pruned, so there is no original to compare it with.")
    original = copy.deepcopy(model)
    reshape(original, None)
    with torch.no_grad():
        for tensor in named_tensors(original).values():
            if tensor.is_floating_point() and not tensor.any():
                tensor.fill_(0.01)  # zeros would be faster on some machines
    return original


@torch.no_grad()
def times(models: Sequence[nn.Module], example_inputs: Any, rounds: int) -> list[list[float]]:
    """Time models in evaluation mode, turn and turn about, after a warm-up of each turn.

    Args:
        models: The models, each on its device.
        example_inputs: What they take, as for `lightning_prune.trace`.
        rounds: Number of turns of each.

    Returns:
        For each model and turn the median time of one forward pass, in milliseconds.
    """

    def turn(model: nn.Module) -> float:
        args, kwargs = placed(example_inputs, model)
        device = next(model.parameters()).device
        return median_time(partial(model.eval(), *args, **kwargs), device, milliseconds=100, most_runs=50)

    return times_in_turns([partial(turn, model) for model in models], rounds)


def _row(size: int, original: list[float], pruned: list[float]) -> tuple[str, str, str, str, str, str]:
    speed = Speed(original, pruned, "")
    times = str(speed.spread_before), str(speed.spread_after)
    return str(size), *times, speed.times_as_fast or "no difference", _rate(size, original), _rate(size, pruned)


def _rate(size: int, milliseconds: list[float]) -> str:
    """Return how many samples a second were processed."""
    return f"{1000 * size / statistics.median(milliseconds):,.0f}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as raised:
        raise ValueError(f"There is no device {name!r} here: choose another with --device.") from raised
    return device
