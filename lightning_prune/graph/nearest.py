"""Names of a model for messages, those nearest to what was asked for first."""

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["nearest_names"]

_MOST = 5


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the names of a model in words, nearest first.

    Args:
        name: What was asked for, perhaps a pattern.
        names: Dotted names of its modules.

    Example:
        >>> nearest_names("backbone", ["", "net", "net.0", "back"])
        "its modules are 'back', 'net', 'net.0'"
    """
    known = [one for one in names if one]

    def distance(other: str) -> float:
        return -SequenceMatcher(None, name, other).ratio()

    nearest = sorted(known, key=distance)
    told = ", ".join(repr(one) for one in nearest[:_MOST])
    if not nearest:
        return "it has no modules in it"
    if len(nearest) > _MOST:
        return f"its modules nearest to that are {told}"
    return f"its modules are {told}"
