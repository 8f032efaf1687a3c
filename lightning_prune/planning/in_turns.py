"""One network at several widths, timed turn and turn about: by whole forward passes, and layer by layer."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.segments import LayerTimer
from lightning_prune.planning.spread import Spread
from lightning_prune.planning.stand_ins import at_widths
from lightning_prune.planning.timing import device_of, median_time, times_in_turns

__all__ = ["forward_times", "layer_times"]

Widths = Mapping[str, int]


def forward_times(
    graph: ChannelGraph, several: Sequence[Widths], rounds: int, milliseconds: float
) -> list[list[float]]:
    """Time forward passes at several widths, turn and turn about.

    Args:
        graph: The traced model.
        several: Channels by group name, for each network; groups that are absent keep all channels.
        rounds: Number of turns of each network, at least 1.
        milliseconds: How long a turn may take; there are three runs in it at least, and twenty at most.

    Returns:
        (networks, rounds) median milliseconds of one forward pass in a turn.
    """
    device = device_of(graph.model)
    turns: list[Callable[[], float]] = []
    with ExitStack() as stack:
        for widths in several:
            network = at_widths(graph, widths)
            run = stack.enter_context(network)
            turn = partial(median_time, run, device, milliseconds, 20)
            turns.append(turn)
        return times_in_turns(turns, rounds)


def layer_times(graph: ChannelGraph, several: Sequence[Widths], rounds: int) -> list[dict[str, Spread]]:
    """Time each layer at several widths, turn and turn about.

    Args:
        graph: The traced model.
        several: Channels by group name, for each network; groups that are absent keep all channels.
        rounds: Number of turns of each network, at least 1.

    Returns:
        For each network the milliseconds from the start of a layer to the start of the next one, by module name, in the
        order of the forward pass; under ``""`` what comes before the first.
    """
    measured: list[dict[str, list[float]]] = []
    turns: list[Callable[[], float]] = []
    with ExitStack() as stack:
        for widths in several:
            network = LayerTimer.at(graph, widths)
            timer = stack.enter_context(network)
            times: dict[str, list[float]] = defaultdict(list)
            measured.append(times)
            turn = partial(_note, timer, times)
            turns.append(turn)
        times_in_turns(turns, rounds)
    return [{name: Spread.of(times) for name, times in of_network.items()} for of_network in measured]


def _note(timer: LayerTimer, measured: dict[str, list[float]]) -> float:
    """Time each layer once, after a run to warm up, and return the sum."""
    timer.run()
    times = timer.run()
    for name, taken in times.items():
        measured[name].append(taken)
    return sum(times.values())
