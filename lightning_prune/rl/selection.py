"""Entries of a table that a setting selects by name, with settings of their own."""

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["select"]


def select(table: Mapping[str, Any], setting: str | Mapping[str, Any], kind: str) -> tuple[Any, dict[str, Any]]:
    """Return the entry that a setting names, and the settings that come with the name.

    Args:
        table: Functions or classes, by name.
        setting: A name, or a mapping that holds the ``name`` and settings of the entry.
        kind: What an entry is called in a message.

    Raises:
        ValueError: If there is no entry of that name, or it has no such setting.

    Example:
        >>> select({"sorted": sorted}, {"name": "sorted", "reverse": True}, "order")
        (<built-in function sorted>, {'reverse': True})
    """
    if isinstance(setting, str):
        setting = {"name": setting}
    settings = dict(setting)
    name = str(settings.pop("name", None))
    if name not in table:
        raise ValueError(f"There is no {kind} {name!r}; those known are {', '.join(table)}.")

    entry = table[name]
    possible = _names_of_settings(entry)
    for key in settings:
        if key not in possible:
            listed = ", ".join(possible) or "none"
            raise ValueError(f"The {kind} {name!r} has no setting {key!r}; it has {listed}.")
    return entry, settings


def _names_of_settings(entry: Any) -> list[str]:
    """Return the names of the parameters that have defaults."""
    parameters = inspect.signature(entry).parameters
    return [name for name, parameter in parameters.items() if parameter.default is not parameter.empty]
