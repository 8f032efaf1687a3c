"""The widths that groups may have: rounded, of at least so many channels, within the cap."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.planning.cost import CostModel, integers

__all__ = ["Limits", "WidthSettings", "check_whole_number"]


@dataclass(frozen=True)
class WidthSettings:
    """What a person asks of the widths, whatever the network.

    Attributes:
        round_to: Layers that lose channels keep a multiple of this many; ``"auto"`` where the metric chooses.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].
    """

    round_to: int | str
    min_channels: int = 1
    cap: float = 1.0


class Limits:
    """Know the widths that rounding, the least number of channels and the cap allow to each group.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of every group: ``-inf`` for channels that are pruned already,
            ``inf`` for those of groups that keep all channels.
        round_to: Layers that lose channels keep a multiple of this many.
        min_channels: Least number of channels of a group.
        cap: Greatest fraction of its original channels that a group may lose, in (0, 1].

    Attributes:
        now: (groups,) what each group still has.
        most: (groups,) the greatest width to prune to: what a group of the original width has, a multiple of one that
            is narrower.
        least: (groups,) the least width.
        step: (groups,) what widths in between are multiples of.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, graph: ChannelGraph, scores: Mapping[str, Tensor], round_to: int, min_channels: int, cap: float = 1.0
    ) -> None:
        check_whole_number("round_to", round_to)
        check_whole_number("min_channels", min_channels)
        if not 0 < cap <= 1:
            raise ValueError(f"cap must be the greatest fraction that a group may lose, in (0, 1]; got {cap!r}.")
        self.round_to = round_to
        self.min_channels = min_channels
        self.cap = cap
        self._groups = list(graph.groups.values())
        ranges = [self._range(group, scores[name]) for name, group in graph.groups.items()]
        self.now = integers(widths.now for widths in ranges)
        self.least = integers(widths.least for widths in ranges)
        self.most = integers(widths.most for widths in ranges)
        self.step = integers(widths.step for widths in ranges)

    @classmethod
    def of_original(cls, graph: ChannelGraph, settings: WidthSettings, round_to: int) -> "Limits":
        """Return the limits of the original network, of which every group may lose channels."""
        alike = {name: torch.zeros(group.size) for name, group in graph.groups.items()}
        return cls(graph, alike, round_to, settings.min_channels, settings.cap)

    def _range(self, group: Group, scores: Tensor) -> "_Range":
        """Return the widths of one group."""
        now = int((scores > -math.inf).sum())
        keeps_all = bool((scores == math.inf).any())
        if not group.least and not keeps_all:  # a residual block is there or not, whatever is asked of channels
            return _Range(now, 0, now, 1)
        step = _step(group, self.round_to)
        if keeps_all:
            return _Range(now, now, now, step)
        # The small number makes it 99 of 100 at a cap of 0.99, where the product may fall just short of it.
        may_lose = math.floor(self.cap * group.size + 1e-9)
        least = max(self.min_channels, group.least, group.size - may_lose)
        rounded_up = math.ceil(least / step) * step
        least = min(rounded_up, now)
        multiple = now // step * step
        most = now if now == group.size else max(least, multiple)
        return _Range(now, least, most, step)

    def reachable(self, cost: CostModel) -> float:
        """Return the least fraction of the original cost that can be kept."""
        return cost.fraction(self.least)

    def check(self, keep: float, metric: str, reachable: float) -> None:
        """Raise a ValueError, with the range, unless a budget is at least the fraction that can be reached."""
        if reachable <= keep:
            return
        if (self.least == self.most).all() and self.min_channels >= self.most.max(initial=0) > 0:
            raise ValueError(
                f"min_channels={self.min_channels} is above every width, of which the greatest is "
                f"{self.most.max()}, so that nothing can be pruned; lower min_channels."
            )
        capped = f", and at most {self.cap} of a layer may be pruned" if self.cap < 1 else ""
        raise ValueError(
            f"keep={keep} of the {metric} cannot be reached: between {reachable:.3f} and 1 can be kept with "
            f"round_to={self.round_to} and min_channels={self.min_channels}{capped}. Raise keep, or "
            "lower round_to."
        )

    def rounded(self, widths: np.ndarray) -> np.ndarray:
        """Round widths down to what is allowed; a group that loses nothing keeps its width."""
        multiples = widths // self.step * self.step
        allowed = np.maximum(multiples, self.least)
        return np.where(widths >= self.most, self.most, allowed)

    def is_block(self, group: int) -> bool:
        """Tell whether a group, given by number, is a residual block."""
        return not self._groups[group].least

    def step_of(self, group: int, round_to: int) -> int:
        """Return what widths of a group would be multiples of, were its layers rounded to another multiple."""
        return _step(self._groups[group], round_to)

    def below(self, width: int, group: int) -> np.ndarray:
        """Return the allowed widths of a group that are less than some width, ascending."""
        return np.arange(self.least[group], width, self.step[group])

    def above(self, width: int, group: int) -> int:
        """Return the next allowed width of a group."""
        wider = width + self.step[group]
        return int(min(wider, self.most[group]))


def _step(group: Group, round_to: int) -> int:
    """Return what widths of a group are multiples of, for those of its layers to be multiples of a number."""
    return round_to // math.gcd(round_to, group.width)


@dataclass(frozen=True)
class _Range:
    """The widths of one group: the present one, the least, the greatest, and what those in between are multiples of."""

    now: int
    least: int
    most: int
    step: int


def check_whole_number(name: str, value: object) -> int:
    """Return a setting; raise a ValueError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    return value
