"""A network in numbers: parameters, FLOPs, time and validation metrics."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_prune.planning.spread import Spread
from lightning_prune.planning.timing import latency_spread
from lightning_prune.reporting.flops import FlopCount, count_flops, told

__all__ = ["Measurement", "measure"]


@dataclass
class Measurement:
    """A network in numbers.

    Attributes:
        params: Number of parameters.
        flops: FLOPs of the example inputs; one FLOP is one multiply-add. What is counted with fvcore, or where it
            cannot run the network what the cost model counts.
        latency_ms: Median time of a forward pass of the example inputs, in milliseconds.
        metrics: Validation metrics by name.
        cost_model_flops: What the cost model counts; None in what earlier versions have written.
        fvcore_failure: Why fvcore could not count; empty if it could.
        fvcore_left_out: Those of the FLOPs that fvcore by itself leaves out, by what it does not count.
        latency_quartiles: The quartiles around ``latency_ms``; None in what earlier versions have written.
    """

    params: int
    flops: int
    latency_ms: float
    metrics: dict[str, float] = field(default_factory=dict)
    cost_model_flops: int | None = None
    fvcore_failure: str = ""
    fvcore_left_out: dict[str, int] = field(default_factory=dict)
    latency_quartiles: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain values."""
        return asdict(self)

    @property
    def latency(self) -> Spread | None:
        """The time of a forward pass with its quartiles, in milliseconds; None if these are not known."""
        if self.latency_quartiles is None:
            return None
        return Spread(self.latency_ms, *self.latency_quartiles)

    def set_latency(self, spread: Spread) -> None:
        """Note the time of a forward pass with its quartiles, in milliseconds."""
        self.latency_ms = spread.median
        self.latency_quartiles = spread.low, spread.high

    @property
    def flops_remark(self) -> str:
        """Who has counted the FLOPs, where fvcore and the cost model do not agree; otherwise empty."""
        if self.fvcore_failure:
            return told(FlopCount(None, failure=self.fvcore_failure), self.flops)
        if not self.fvcore_left_out and self.cost_model_flops in (None, self.flops):
            return ""
        return told(FlopCount(self.flops, self.fvcore_left_out), self.cost_model_flops)


def measure(
    network: nn.Module, example_inputs: Any, cost_model_flops: int, latency: Spread | None = None
) -> Measurement:
    """Count and time a network as it is now.

    Args:
        network: The network; it is not changed.
        example_inputs: What its ``forward`` takes, as for `lightning_prune.trace`.
        cost_model_flops: What the cost model counts for the network.
        latency: Milliseconds of a forward pass, if they are known; otherwise they are measured.

    Example:
        >>> import torch
        >>> measured = measure(nn.Linear(8, 4), torch.zeros(1, 8), cost_model_flops=30)
        >>> measured.params, measured.flops
        (36, 32)
        >>> measured.flops_remark
        '32 counted by fvcore, 30 by the cost model (-2)'
    """
    counted = count_flops(network, example_inputs)
    taken = latency_spread(network, example_inputs) if latency is None else latency
    return Measurement(
        params=sum(parameter.numel() for parameter in network.parameters()),
        flops=cost_model_flops if counted.total is None else counted.total,
        latency_ms=taken.median,
        latency_quartiles=(taken.low, taken.high),
        cost_model_flops=cost_model_flops,
        fvcore_failure=counted.failure,
        fvcore_left_out=counted.left_out,
    )
