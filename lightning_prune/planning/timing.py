"""Measured time of a forward pass, of one network or of several in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.compiled import as_written
from lightning_prune.graph.entry import as_call, let_in
from lightning_prune.graph.twin import twin_in_evaluation
from lightning_prune.planning.spread import Spread
from lightning_prune.progress import progress

__all__ = [
    "device_of",
    "latency_spread",
    "measure_latency",
    "median_time",
    "placed",
    "run_times",
    "timed",
    "times_in_turns",
    "wait",
]

_LEAST_RUNS = 3  # of which the median counts
_SHORTEST = 1e-3  # milliseconds: what a clock may tell of next to nothing


def measure_latency(model: nn.Module, example_inputs: Any, runs: int = 20, warm_up: int = 5) -> float:
    """Measure the time of one forward pass in evaluation mode, where the model is now.

    Args:
        model: The model; a twin of it runs, as it was written where it is compiled.
        example_inputs: What ``forward`` takes, as for `lightning_prune.trace`; moved to the model's device.
        runs: Number of timed runs; the median counts.
        warm_up: Number of runs before that.

    Returns:
        Milliseconds.

    Example:
        >>> measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), runs=3) > 0
        True
    """
    return latency_spread(model, example_inputs, runs, warm_up).median


@torch.no_grad()
def latency_spread(model: nn.Module, example_inputs: Any, runs: int = 20, warm_up: int = 5) -> Spread:
    """Measure as `measure_latency` does, and return the median with the quartiles, in milliseconds."""
    args, kwargs = placed(example_inputs, model)
    device = device_of(model)
    with twin_in_evaluation(model) as twin, as_written():
        let_in(twin.model, example_inputs)
        run = partial(twin.model, *args, **kwargs)
        times = [timed(run, device) for _ in range(warm_up + runs)]
    return Spread.of(times[warm_up:])


def times_in_turns(turns: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Time several networks turn and turn about, so that what else the machine does slows all of them alike.

    Args:
        turns: For each network, what times it once and returns milliseconds.
        rounds: How often each has its turn.

    Returns:
        (networks, rounds) milliseconds.

    Example:
        >>> clock = iter([1.0, 10.0, 2.0, 20.0])
        >>> times_in_turns([lambda: next(clock), lambda: next(clock)], rounds=2)
        [[1.0, 2.0], [10.0, 20.0]]
    """
    times: list[list[float]] = [[] for _ in turns]
    with progress("Timing, turn and turn about", rounds * len(turns)) as work:
        for _ in range(rounds):
            for turn, times_of_network in zip(turns, times, strict=True):
                times_of_network.append(turn())
                work.advance()
    return times


def median_time(run: Callable[[], Any], device: torch.device, milliseconds: float, most_runs: int) -> float:
    """Return the median time of a function over some runs after one to warm up.

    Args:
        run: What is timed.
        device: Where it works.
        milliseconds: How long the runs may take together; there are three at least.
        most_runs: Greatest number of runs.

    Returns:
        Milliseconds of one run.
    """
    return statistics.median(run_times(run, device, milliseconds, most_runs))


def run_times(run: Callable[[], Any], device: torch.device, milliseconds: float, most_runs: int) -> list[float]:
    """Return the times of runs of a function as `median_time` has them, in milliseconds, in their order."""
    warm_up = max(timed(run, device), _SHORTEST)
    affordable_runs = int(milliseconds / warm_up)
    runs = min(most_runs, max(_LEAST_RUNS, affordable_runs))
    return [timed(run, device) for _ in range(runs)]


def placed(example_inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments, on the device and in the precision of a model."""
    first = next(model.parameters(), None)
    if first is None:
        return as_call(example_inputs)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        precision = first.dtype if leaf.is_floating_point() else None
        return leaf.to(first.device, precision)

    return tree_map(place, as_call(example_inputs))


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model runs on: the CPU if it has no parameters.

    Raises:
        ValueError: If it has no data to run on.

    Example:
        >>> device_of(nn.ReLU())
        device(type='cpu')
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("A model on the meta device has no values to run with; load its weights, then measure it.")
    return device


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds that a function takes, the work that it gives to the device included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return 1000 * (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
