"""The budget of a plan: the fraction of the original cost that was asked for, and what came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["NEARLY_ALL", "Budget", "check_keep", "kept_of"]

NEARLY_ALL = 0.95
"""Of the budget: where less of it is used, a wider or finer plan is looked for, and what is left is worth a word."""


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
        finer: The one group that this was too coarse for, with its own multiple; None if there is none.

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
    finer: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plans tell it; of a group that is finer only where there is one."""
        told = asdict(self)
        if self.finer is None:
            del told["finer"]
        return told


def kept_of(budget: Mapping[str, Any]) -> str:
    """Say of the budget of a plan what is kept and what was asked for; nothing of a plan that was made for none.

    Args:
        budget: What `Budget.to_json` returns.

    Example:
        >>> kept_of({"metric": "flops", "asked": 0.7, "achieved": 0.685, "finer": {"stem": 4}})
        "0.685 of the flops is kept where keep=0.700 was asked for, with 'stem' alone at a multiple of 4"
    """
    if not budget.keys() >= {"metric", "asked", "achieved"}:
        return ""
    kept = f"{budget['achieved']:.3f} of the {budget['metric']} is kept where keep={budget['asked']:.3f} was asked for"
    for name, multiple in budget.get("finer", {}).items():
        kept += f", with {name!r} alone at a multiple of {multiple}"
    return kept


def check_keep(keep: float) -> None:
    """Raise a ValueError unless the fraction is in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep must be the fraction that is kept, above 0 and at most 1; got {keep!r}.")
