"""How much faster a pruned network is than the whole one."""

from functools import partial
from typing import Any

from torch import nn

from lightning_prune.planning import measure_latency, times_in_turns

__all__ = ["speed_ups"]


def speed_ups(whole: nn.Module, pruned: nn.Module, inputs: Any, rounds: int, runs: int, warm_up: int) -> list[float]:
    """Time both networks in turn, so that what else the machine does slows both, and return a ratio for each round.

    Args:
        whole: The network before.
        pruned: The network after.
        inputs: What both take.
        rounds: How often both have their turn.
        runs: Timed runs in a turn; the median counts.
        warm_up: Runs before these.
    """
    turns = [partial(measure_latency, network, inputs, runs, warm_up) for network in (whole, pruned)]
    return [before / after for before, after in zip(*times_in_turns(turns, rounds), strict=True)]
