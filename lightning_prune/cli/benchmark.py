"""``lightning-prune benchmark CKPT``: latency and throughput of a pruned model against the original."""

import copy
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.cli.loading import add_loading_options, load_given
from lightning_prune.cli.option_errors import CommandParser
from lightning_prune.export import random_inputs
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.planning.timing import median_time, placed, times_in_turns
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.summary import aligned
from lightning_prune.surgery import reshape

__all__ = ["main", "original_of", "times"]


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-prune benchmark``.

    Args:
        arguments: The command line after ``benchmark``.
    """
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
    add_loading_options(parser)
    given = parser.parse_args(arguments)
    if min(given.batch_sizes) < 1 or given.rounds < 1 or given.threads < 1:
        parser.error("batch sizes, rounds and threads must be at least 1")
    loaded = load_given(given.checkpoint, given)
    device = _device(given.device)
    original = original_of(loaded.model)
    torch.set_num_threads(given.threads)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {given.threads} threads"
    turns = f"median (quartiles) of {given.rounds} turns"
    print(f"{type(loaded.model).__name__} on {where}, torch {torch.__version__}; {turns}")
    rows = [("batch", "original (ms)", "pruned (ms)", "speed-up", "original (1/s)", "pruned (1/s)")]
    for size in given.batch_sizes:
        inputs = random_inputs(loaded.inputs, size)
        original_ms, pruned_ms = times([original.to(device), loaded.model.to(device)], inputs, given.rounds)
        rows.append(_row(size, original_ms, pruned_ms))
    print("\n".join(aligned(rows)))


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
    speed_ups = [before / after for before, after in zip(original, pruned, strict=True)]
    speed_up = f"{statistics.median(speed_ups):.2f}x"
    return str(size), _told(original), _told(pruned), speed_up, _rate(size, original), _rate(size, pruned)


def _rate(size: int, milliseconds: list[float]) -> str:
    """Return how many samples a second were processed."""
    return f"{1000 * size / statistics.median(milliseconds):,.0f}"


def _told(milliseconds: list[float]) -> str:
    if len(milliseconds) == 1:
        milliseconds = milliseconds * 2  # of one turn, all quartiles are alike
    low, middle, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as raised:
        raise ValueError(f"There is no device {name!r} here: choose another with --device.") from raised
    return device
