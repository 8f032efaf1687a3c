"""Measured time of a forward pass."""

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_prune.graph.tracing import as_call

__all__ = ["measure_latency"]


@torch.no_grad()
def measure_latency(model: nn.Module, example_inputs: Any, runs: int = 20, warm_up: int = 5) -> float:
    """Measure the time of one forward pass in evaluation mode, where the model is now.

    Args:
        model: The model; its mode is restored.
        example_inputs: What ``forward`` takes, as for `lightning_prune.trace`; moved to the model's device.
        runs: Number of timed runs; the median counts.
        warm_up: Number of runs before that.

    Returns:
        Milliseconds.

    Example:
        >>> measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), runs=3) > 0
        True
    """
    first = next(model.parameters())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(first.device, first.dtype if leaf.is_floating_point() else None)

    args, kwargs = tree_map(place, as_call(example_inputs))
    flags = [(module, module.training) for module in model.modules()]
    times = []
    try:
        model.eval()
        for run in range(warm_up + runs):
            _wait(first.device)
            started = time.perf_counter()
            model(*args, **kwargs)
            _wait(first.device)
            if run >= warm_up:
                times.append(time.perf_counter() - started)
    finally:
        for module, training in flags:
            module.training = training
    return 1000 * statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
