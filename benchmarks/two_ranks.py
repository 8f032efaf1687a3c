"""How much faster two ranks (gloo) do some work than one, beside how much faster this machine lets them be.

Three ways take turns: one rank does all of the work; two that do not know of each other do all of it each, at the same
time; two ranks share it. The second says what the machine allows: twice the work, in the time that it takes where two
processors have memory and heat in common.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing

__all__ = ["GOAL", "compare"]

GOAL = 1.8
Work = Callable[[], Any]


def compare(make: Callable[[Any], Work], settings: Any, rounds: int) -> None:
    """Print the medians over some rounds.

    Args:
        make: Called on each rank with the settings, returns the work; a function of a module.
        settings: What ``make`` needs.
        rounds: How often each way has its turn.
    """
    context = multiprocessing.get_context("spawn")
    turn, result = context.Barrier(2), context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (make, settings, rounds, folder, turn, result), nprocs=2)
    ratio, allowed, of_cpu = result.get()
    verdict = "met" if ratio >= GOAL else "MISSED"
    print(
        f"two ranks against one: {ratio:.2f} (goal {GOAL}: {verdict}); by processor time, the busier rank: {of_cpu:.2f}"
    )
    print(f"two processes that share nothing but the machine: {allowed:.2f}")


def _rank(
    number: int, make: Callable[[Any], Work], settings: Any, rounds: int, folder: str, turn: Any, result: Any
) -> None:
    torch.set_num_threads(1)
    work = make(settings)
    work()  # warms up
    found: list[tuple[float, float, float]] = []
    for n in range(rounds):
        alone, spent_alone = _timed(work if number == 0 else lambda: None, turn)
        each, _ = _timed(work, turn)
        distributed.init_process_group("gloo", f"file://{folder}/{n}", rank=number, world_size=2)
        together, spent = _timed(work, turn)
        busier = torch.tensor(spent)
        distributed.all_reduce(busier, distributed.ReduceOp.MAX)
        distributed.destroy_process_group()
        found.append((alone / together, 2 * alone / each, spent_alone / float(busier)))
    if number == 0:
        result.put(tuple(map(statistics.median, zip(*found, strict=True))))


def _timed(work: Work, turn: Any) -> tuple[float, float]:
    """Return the seconds until both are done, and those of processor time here."""
    turn.wait()
    start, used = time.perf_counter(), time.process_time()
    work()
    used = time.process_time() - used
    turn.wait()
    return time.perf_counter() - start, used
