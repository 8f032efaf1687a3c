"""Plain values from files: made into the records that they were written from, or refused with what is wrong where."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["MisfitError", "made"]

_LARGEST = 2**63 - 1  # of whole numbers, as tensors hold them
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class MisfitError(ValueError):
    """Say that a value is not what belongs in its place.

    Args:
        place: Where it is, from the record that is made.
        problem: What is wrong with it.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place.lstrip('.') or 'it'} {problem}")
        self.place = place
        self.problem = problem


def made(kind: Any, content: Any) -> Any:
    """Make a value of a declared type from plain values, as JSON has them.

    Args:
        kind: A dataclass, or what its fields are declared as: ``int``, ``float``, ``str``, ``bool``, ``Any``, or a
            list, tuple or dictionary of these, or one of these or ``None``.
        content: What it is made from. A dataclass is made from a mapping with its fields, or a list in their order.

    Raises:
        MisfitError: If the content is something else; the message, without its full stop, says where.

    Example:
        >>> made(dict[str, tuple[int, ...]], {"fc.weight": [10, 4]})
        {'fc.weight': (10, 4)}
        >>> made(dict[str, tuple[int, ...]], {"fc.weight": [10, -0.5]})
        Traceback (most recent call last):
        lightning_prune.plain.MisfitError: ['fc.weight'][1] is -0.5, not a whole number
    """
    if kind is Any:
        return content
    if kind in _NAMES:
        return _single(kind, content)
    if is_dataclass(kind):
        return _record(kind, content)
    return _FORMS[get_origin(kind)](get_args(kind), content)


def _single(kind: type, content: Any) -> Any:
    if kind is float and content is None:
        return float("nan")  # as JSON from elsewhere has it, which knows no numbers that are not finite
    if kind is float and type(content) is int:
        content = float(content) if abs(content) <= _LARGEST else content
    is_truth = isinstance(content, bool)  # which Python counts among the whole numbers
    if not isinstance(content, kind) or is_truth is not (kind is bool):
        raise MisfitError("", f"is {_shown(content)}, not {_NAMES[kind]}")
    if isinstance(content, int) and abs(content) > _LARGEST:
        raise MisfitError("", f"is {_shown(content)}, beyond all that can be counted")
    return content


def _record(kind: Any, content: Any) -> Any:
    declared = {one.name: one for one in fields(kind) if one.init}
    if isinstance(content, list | tuple) and len(content) <= len(declared):
        content = dict(zip(declared, content, strict=False))
    if not isinstance(content, Mapping):
        raise MisfitError("", f"is {_shown(content)}, not a mapping")
    for name in content:
        if name not in declared:
            raise MisfitError("", f"has an entry {_shown(name)}, which is unknown")
    values = {}
    for name, one in declared.items():
        if name in content:
            values[name] = _within(f".{name}", _hints(kind)[name], content[name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise MisfitError("", f"has no entry {name!r}")
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _within(place: str, kind: Any, content: Any) -> Any:
    """Make a value that lies in a place of another one."""
    try:
        return made(kind, content)
    except MisfitError as inner:
        raise MisfitError(place + inner.place, inner.problem) from None


def _list(kinds: tuple[Any, ...], content: Any) -> list[Any]:
    if not isinstance(content, list | tuple):
        raise MisfitError("", f"is {_shown(content)}, not a list")
    return [_within(f"[{number}]", kinds[0], value) for number, value in enumerate(content)]


def _tuple(kinds: tuple[Any, ...], content: Any) -> tuple[Any, ...]:
    if kinds[1:] == (...,):
        return tuple(_list(kinds, content))
    if not isinstance(content, list | tuple) or len(content) != len(kinds):
        raise MisfitError("", f"is {_shown(content)}, not a list of {len(kinds)}")
    pairs = enumerate(zip(kinds, content, strict=True))
    return tuple(_within(f"[{number}]", kind, value) for number, (kind, value) in pairs)


def _dict(kinds: tuple[Any, ...], content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise MisfitError("", f"is {_shown(content)}, not a mapping")
    for name in content:
        if not isinstance(name, str):
            raise MisfitError("", f"has a name {_shown(name)}, which is not a text")
    return {name: _within(f"[{name!r}]", kinds[1], value) for name, value in content.items()}


def _optional(kinds: tuple[Any, ...], content: Any) -> Any:
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    return None if content is None else made(kind, content)


_FORMS: dict[Any, Callable[[tuple[Any, ...], Any], Any]] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    UnionType: _optional,
}


def _shown(value: Any) -> str:
    """Return a value in words that fit into a sentence."""
    if isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > _LARGEST:  # of which some have no decimal form
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
