"""Things that a setting names by their import path."""

from importlib import import_module
from typing import Any

__all__ = ["imported"]


def imported(path: str) -> Any:
    """Return what an import path names.

    Args:
        path: Module and attribute, such as ``"torch.nn.Linear"``.

    Raises:
        ImportError: If there is no such module, it cannot be imported, or it has no such attribute.

    Example:
        >>> imported("math.pi")
        3.141592653589793
    """
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (AttributeError, ValueError, TypeError) as error:  # no attribute, or no path at all
        raise ImportError(str(error)) from error
