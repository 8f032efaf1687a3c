"""Measured time of a forward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_prune.graph.substitution import preserving_attributes, replace_tensors
from lightning_prune.graph.tracing import as_call

__all__ = ["measure_latency", "placed", "timed", "wait"]


@torch.no_grad()
def measure_latency(model: nn.Module, example_inputs: Any, runs: int = 20, warm_up: int = 5) -> float:
    """Measure the time of one forward pass in evaluation mode, where the model is now.

    Args:
        model: The model; its mode is restored, and what its forward pass counts and collects.
        example_inputs: What ``forward`` takes, as for `lightning_prune.trace`; moved to the model's device.
        runs: Number of timed runs; the median counts.
        warm_up: Number of runs before that.

    Returns:
        Milliseconds.

    Example:
        >>> measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), runs=3) > 0
        True
    """
    args, kwargs = placed(example_inputs, model)
    device = next(model.parameters()).device
    flags = [(module, module.training) for module in model.modules()]
    buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
    try:
        model.eval()
        with preserving_attributes(model):
            for module in model.modules():
                replace_tensors(module, buffers)
            times = [timed(lambda: model(*args, **kwargs), device) for _ in range(warm_up + runs)]
    finally:
        for module, training in flags:
            module.training = training
    return statistics.median(times[warm_up:])


def placed(example_inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and named arguments, on the device and in the precision of a model."""
    first = next(model.parameters())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(first.device, first.dtype if leaf.is_floating_point() else None)

    return tree_map(place, as_call(example_inputs))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds that a function takes, work that it leaves to the device included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return 1000 * (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
