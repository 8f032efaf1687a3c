"""The spread of what was measured several times: its median, and the quartiles around it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "ratios"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles.

    Attributes:
        median: Half of what was measured is not above it.
        low: A quarter is not above it.
        high: Three quarters are not above it.

    Example:
        >>> spread = Spread.of([1.0, 2.0, 3.0, 4.0, 9.0])
        >>> print(spread)
        3.00 (2.00-4.00)
        >>> spread.overlaps(Spread.of([4.0, 5.0, 6.0])), spread.overlaps(Spread.of([4.5, 5.0, 6.0]))
        (False, False)
        >>> spread.overlaps(Spread.of([3.0, 4.0, 6.0]))
        True
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values, one at least."""
        several = list(values) * 2 if len(values) == 1 else values  # of one value, all quartiles are alike
        low, median, high = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, low, high)

    def overlaps(self, other: "Spread") -> bool:
        """Tell whether the middle halves of both have something in common, so that neither is known to be less."""
        return not (self.low > other.high or other.low > self.high)  # nor is it of what is no number

    def __str__(self) -> str:
        numbers = self.median, self.low, self.high
        digits = 2 if self.median >= 1 else 3
        middle, low, high = (f"{number:.{digits}f}" for number in numbers)
        return f"{middle} ({low}-{high})"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of the ratios of values that were measured in the same turns.

    Example:
        >>> print(ratios([4.0, 6.0], [2.0, 2.0]))
        2.50 (2.25-2.75)
    """
    pairs = zip(numerators, denominators, strict=True)
    return Spread.of([one / other for one, other in pairs])
