"""Lightning comes in two packages, ``lightning`` and ``pytorch_lightning``: the same code in classes of their own."""

import sys
from typing import Any, TypeVar

__all__ = ["PACKAGES", "namesakes"]

Kind = TypeVar("Kind")

# Where each package has what the first one has.
_PLACES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def namesakes(*kinds: type[Kind]) -> tuple[type[Kind], ...]:
    """Return classes of ``lightning``, and those of ``pytorch_lightning`` by the same names if that is in use.

    Nothing is imported: what was never imported has no instances.

    Args:
        kinds: The classes of ``lightning``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> namesakes(Trainer)[0] is Trainer
        True
    """
    others = [_other(kind) for kind in kinds]
    return (*kinds, *(other for other in others if other is not None))


def _other(kind: type) -> Any:
    """Return the class of the other package."""
    for place, other_place in _PLACES.items():
        if kind.__module__.startswith(place):
            module = sys.modules.get(kind.__module__.replace(place, other_place, 1))
            return getattr(module, kind.__name__, None)
    return None
