"""Parts that a setting names."""

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["chosen"]


def chosen(known: Mapping[str, Any], setting: str | Mapping[str, Any], kind: str) -> tuple[Any, dict[str, Any]]:
    """Return what a setting names, and the settings that come with the name.

    Args:
        known: What there is, by name.
        setting: A name, or a mapping with a name and settings.
        kind: What it is called in a message.

    Raises:
        ValueError: If there is nothing of that name, or it has no such setting.

    Example:
        >>> chosen({"sorted": sorted}, {"name": "sorted", "reverse": True}, "order")
        (<built-in function sorted>, {'reverse': True})
    """
    settings = {"name": setting} if isinstance(setting, str) else dict(setting)
    name = str(settings.pop("name", None))
    if name not in known:
        raise ValueError(f"There is no {kind} {name!r}; those known are {', '.join(known)}.")
    parameters = inspect.signature(known[name]).parameters.values()
    possible = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    for key in settings:
        if key not in possible:
            raise ValueError(f"The {kind} {name!r} has no setting {key!r}; it has {', '.join(possible) or 'none'}.")
    return known[name], settings
