"""How much faster a network is: two widths of it timed in the same turns, told with the spread, or not at all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.in_turns import forward_times, layer_times
from lightning_prune.planning.spread import Spread, ratios
from lightning_prune.planning.timing import device_of

__all__ = ["ROUNDS", "Speed", "compare_layers", "compare_speed"]

ROUNDS = 9  # turns of each network
_MILLISECONDS = 50  # of each turn


@dataclass
class Speed:
    """Times of forward passes of two networks, taken turn and turn about, in one process with the same threads.

    Attributes:
        before: (rounds,) milliseconds of the original network, one for each turn.
        after: (rounds,) milliseconds of the pruned one.
        where: What it ran on, in words.

    Example:
        >>> speed = Speed([2.0, 2.2, 2.1], [1.0, 1.1, 1.0], "CPU, 1 thread")
        >>> speed.verdict
        '2.00x as fast (2.00-2.05)'
        >>> Speed([2.0, 2.2, 2.1], [2.1, 2.0, 1.9], "CPU, 1 thread").verdict
        'no faster or slower, as far as was measured'
    """

    before: list[float]
    after: list[float]
    where: str

    @property
    def is_sound(self) -> bool:
        """Whether there are as many times of one network as of the other, all of them above 0."""
        times = [*self.before, *self.after]
        finite = all(0 < taken < math.inf for taken in times)
        return finite and len(self.before) == len(self.after) > 0

    @property
    def spread_before(self) -> Spread:
        """The spread of the milliseconds of the original network."""
        return Spread.of(self.before)

    @property
    def spread_after(self) -> Spread:
        """The spread of the milliseconds of the pruned network."""
        return Spread.of(self.after)

    @property
    def is_told(self) -> bool:
        """Whether one is faster: the middle halves of their times do not overlap."""
        return not self.spread_before.overlaps(self.spread_after)

    @property
    def times_as_fast(self) -> str:
        """How many times as fast the pruned network is, with the quartiles; empty where that is not known."""
        if not self.is_told:
            return ""
        spread = ratios(self.before, self.after)
        return f"{spread.median:.2f}x ({spread.low:.2f}-{spread.high:.2f})"

    @property
    def verdict(self) -> str:
        """The same in words."""
        if not self.is_told:
            return "no faster or slower, as far as was measured"
        times, _, spread = self.times_as_fast.partition(" ")
        return f"{times} as fast {spread}"

    @property
    def how(self) -> str:
        """How it was measured, in words."""
        return f"{len(self.before)} turns of each network, turn and turn about, on {self.where}; quartiles in brackets"


def compare_speed(graph: ChannelGraph, widths: Mapping[str, int]) -> Speed:
    """Time a network at its original widths and at others, turn and turn about.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent keep all channels.
    """
    before, after = forward_times(graph, [{}, widths], ROUNDS, _MILLISECONDS)
    return Speed(before, after, _where(device_of(graph.model)))


def compare_layers(graph: ChannelGraph, widths: Mapping[str, int]) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Time the layers of a network at its original widths and at others, turn and turn about.

    Args:
        graph: The traced model.
        widths: Channels by group name; groups that are absent keep all channels.

    Returns:
        Milliseconds by module name, before and after.
    """
    before, after = layer_times(graph, [{}, widths], ROUNDS)
    return before, after


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' * (threads != 1)}"
