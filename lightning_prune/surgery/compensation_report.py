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
        samples: Number of samples in these.
        errors: What became of each layer whose weight was changed, by the name of the weight.
        scores: What became of the products of queries and keys whose channels were pruned, but for a constant that all
            products of a query have in common, by the name of the weight that makes the queries.
        not_compensated: Why a weight that consumes pruned channels, or makes pruned queries and keys, is as it was, by
            its name.
    """

    method: str = "none"
    batches: int = 0
    samples: int = 0
    errors: dict[str, LayerError] = field(default_factory=dict)
    scores: dict[str, LayerError] = field(default_factory=dict)
    not_compensated: dict[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """The mean over layers of the error that is left; 0 if no weight was changed."""
        left = [error.after for error in self.errors.values()]
        return sum(left) / max(1, len(left))

    @property
    def worst(self) -> str:
        """The name of the weight with the greatest error that is left; empty if no weight was changed."""
        return max(self.errors, key=lambda name: self.errors[name].after, default="")

    @property
    def summary(self) -> str:
        """One line on the method, what it looked at, and the mean and greatest error that is left."""
        seen = f"{self.samples} samples in {self.batches} batches"
        line = f"compensated by {self.method}, {len(self.errors)} layers, {seen}"
        if self.scores:
            worst = max(error.after for error in self.scores.values())
            line = f"{line}, error of scores at most {worst:.2g}"
        if not self.worst:
            return line
        worst = self.errors[self.worst].after
        return f"{line}, error {self.mean_error:.2g} of the variance on average, at most {worst:.2g} ({self.worst})"

    def __str__(self) -> str:
        lines = [self.summary]
        for name, error in self.errors.items():
            lines.append(f"  {name}: error {error.before:.2g} -> {error.after:.2g} of the variance")
        for name, error in self.scores.items():
            lines.append(f"  {name}: scores, error {error.before:.2g} -> {error.after:.2g} of their square")
        for name, reason in self.not_compensated.items():
            lines.append(f"  {name}: not compensated, because {reason}")
        return "\n".join(lines)
