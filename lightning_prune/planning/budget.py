"""The budget of a plan: the fraction of the original cost that was asked for, and what came of it."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Budget", "check_keep"]


@dataclass(frozen=True)
class Budget:
    """What a plan was asked to keep and what it keeps; all but ``original`` are fractions of the original cost.

    Attributes:
        metric: What the cost is, as in ``"flops"``.
        asked: The fraction that was asked for.
        reachable: The least fraction that could have been kept.
        rounded: The fraction that the best channels came to in whole rounding steps.
        achieved: The fraction that is kept, once what rounding saved has been given back.
        original: The cost of the original network.
        round_to: The multiple that widths were rounded to.

    Example:
        >>> budget = Budget("flops", asked=0.5, reachable=0.1, rounded=0.4, achieved=0.48, original=1e9, round_to=8)
        >>> budget.to_json()["achieved"]
        0.48
    """

    metric: str
    asked: float
    reachable: float
    rounded: float
    achieved: float
    original: float
    round_to: int

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plans tell it."""
        return asdict(self)


def check_keep(keep: float) -> None:
    """Raise a ValueError unless the fraction is in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep must be the fraction that is kept, above 0 and at most 1; got {keep!r}.")
