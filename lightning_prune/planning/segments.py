"""Segments of a forward pass: the time from the start of one layer to the start of the next."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.stand_ins import Forward, at_widths
from lightning_prune.planning.timing import wait

__all__ = ["LayerTimer", "Segment", "time_segments"]


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
    shortest: dict[Segment, float] = {}
    with LayerTimer.at(graph, widths) as timer:
        timer.run()
        for _ in range(runs):
            for segment, taken in timer.run_segments().items():
                shortest[segment] = min(taken, shortest.get(segment, taken))
    return shortest


class LayerTimer:
    """Runs a network and tells how long each of its layers takes.

    Args:
        watch: What notes when layers start.
        forward: Runs the network.
    """

    def __init__(self, watch: "_Stopwatch", forward: Forward) -> None:
        self._watch = watch
        self._forward = forward

    @classmethod
    @contextmanager
    def at(cls, graph: ChannelGraph, widths: Mapping[str, int]) -> Iterator["LayerTimer"]:
        """Give the network the shapes it has at some widths, for a block.

        Args:
            graph: The traced model.
            widths: Channels by group name; groups that are absent keep all channels.
        """
        watch = _Stopwatch(graph, next(graph.model.parameters()).device)
        with at_widths(graph, widths, watch.watched) as forward:
            yield cls(watch, forward)

    def run(self) -> dict[str, float]:
        """Run the network once.

        Returns:
            Milliseconds by module name, in the order of the forward pass; of a layer that runs several times their sum.
        """
        times: dict[str, float] = {}
        for segment, taken in self.run_segments().items():
            times[segment.module] = times.get(segment.module, 0.0) + taken
        return times

    def run_segments(self) -> dict[Segment, float]:
        """Run the network once, and return the milliseconds of each segment."""
        self._watch.reset()
        wait(self._watch.device)
        self._watch.mark("")
        self._forward()
        self._watch.mark("")
        wait(self._watch.device)
        return self._watch.segments()


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
        self.device = device
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
