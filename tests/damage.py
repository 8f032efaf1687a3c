"""What tests of damaged files share: every place within nested plain values, a change there, what is said of it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value within nested ones."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def changed(whole: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """Return a copy of nested values, changed by a function of an inner owner and a key of it."""
    whole = copy.deepcopy(whole)
    owner = whole
    for key in path[:-1]:
        owner = owner[key]
    change(owner, path[-1])
    return whole


def refusal(act: Callable[[], Any]) -> str | None:
    """Return the sentence that something is refused with; all but a ValueError is a fault."""
    try:
        act()
    except ValueError as raised:
        return str(raised)
    return None
