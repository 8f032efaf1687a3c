"""What compensation has done to each layer, and what it could not do."""

from dataclasses import dataclass, field

__all__ = ["CompensationReport", "LayerError"]


@dataclass(frozen=True)
class LayerError:
    """How far the output of a layer is from that in the network before the prune, by its variance.

    Attributes:
        before: The mean squared error with the weights as they were.
        after: The mean squared error with those that compensate.
    """

    before: float
    after: float


@dataclass
class CompensationReport:
    """What compensation has done.

    Attributes:
        method: ``"none"``, ``"statistics"``, ``"fold"`` or ``"refit"``.
        batches: Number of batches that it looked at.
        errors: What became of each layer whose weight was changed, by the name of the weight.
        not_compensated: Why a weight that consumes pruned channels is as it was, by its name.
    """

    method: str = "none"
    batches: int = 0
    errors: dict[str, LayerError] = field(default_factory=dict)
    not_compensated: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"compensated by {self.method}, {len(self.errors)} layers, {self.batches} batches"]
        for name, error in self.errors.items():
            lines.append(f"  {name}: error {error.before:.2g} -> {error.after:.2g} of the variance")
        for name, reason in self.not_compensated.items():
            lines.append(f"  {name}: not compensated, because {reason}")
        return "\n".join(lines)
