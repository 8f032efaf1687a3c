"""Segments of a forward pass: the time from the start of one layer to the start of the next."""

import itertools
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.stand_ins import Forward, at_widths
from lightning_prune.planning.timing import wait

__all__ = ["Segment", "time_by_layer", "time_segments"]


class Segment(NamedTuple):
    """A layer that starts: its module, ``""`` for the start of the network, and how often it has run before."""

    module: str
    call: int


def time_segments(graph: ChannelGraph, widths: Mapping[str, int], runs: int) -> dict[Segment, float]:
    """Return the shortest time of each segment over some runs after one to warm up.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent keep all channels.
        runs: Number of timed runs.

    Returns:
        Milliseconds by segment, in the order of the forward pass.
    """
    device = next(graph.model.parameters()).device
    watch = _Stopwatch(graph, device)
    shortest: dict[Segment, float] = {}
    with at_widths(graph, widths, watch.watched) as run:
        run()
        for _ in range(runs):
            watch.reset()
            wait(device)
            watch.mark("")
            run()
            watch.mark("")
            wait(device)
            for segment, taken in watch.segments().items():
                shortest[segment] = min(taken, shortest.get(segment, taken))
    return shortest


def time_by_layer(graph: ChannelGraph, widths: Mapping[str, int], runs: int = 5) -> dict[str, float]:
    """Measure how long each layer of a network takes at some widths.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent keep all channels.
        runs: Number of timed runs; the fastest of each layer counts.

    Returns:
        Milliseconds from the start of a layer to the start of the next one, by module name, in the order of the forward
        pass; under ``""`` what comes before the first.
    """
    times: dict[str, float] = {}
    for segment, taken in time_segments(graph, widths, runs).items():
        times[segment.module] = times.get(segment.module, 0.0) + taken
    return times


class _Stopwatch:
    """Note when each layer starts: each module that has tensors or costs something.

    Args:
        graph: The traced model.
        device: Where the model is.
    """

    def __init__(self, graph: ChannelGraph, device: torch.device) -> None:
        costly = {term.module for term in graph.terms["flops"]}
        self.names = {
            id(module): name
            for name, module in graph.model.named_modules()
            if name in costly or module._parameters or module._buffers
        }
        self.on_gpu = device.type == "cuda"
        self.starts: list[tuple[Segment, Any]] = []
        self.calls: Counter[str] = Counter()

    def watched(self, module: nn.Module, forward: Forward) -> Forward:
        """Return a forward function that notes when it starts."""
        name = self.names.get(id(module))
        if name is None:
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.mark(name)
            return forward(*args, **kwargs)

        return run

    def reset(self) -> None:
        """Forget what was noted."""
        self.starts.clear()
        self.calls.clear()

    def mark(self, name: str) -> None:
        """Note that a module starts now."""
        segment = Segment(name, self.calls[name])
        self.starts.append((segment, self._now()))
        self.calls[name] += 1

    def segments(self) -> dict[Segment, float]:
        """Return the milliseconds from each start to the next."""
        pairs = itertools.pairwise(self.starts)
        return {segment: self._milliseconds(start, stop) for (segment, start), (_, stop) in pairs}

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, start: Any, stop: Any) -> float:
        if self.on_gpu:
            return start.elapsed_time(stop)
        return 1000 * (stop - start)
