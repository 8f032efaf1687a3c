"""What optimizers hold: the optimizers inside them, and the numbers that lie elsewhere than in their state."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.substitution import named_tensors

__all__ = [
    "LIGHTNING",
    "larger_tensors",
    "listed",
    "numbers_elsewhere",
    "package_of",
    "search",
    "shape_of",
    "unwrapped",
    "with_inner",
]

Found = tuple[str, Any]  # where something is, in Python, and what it is

_NOTHING_INSIDE = (str, bytes, int, float, complex, type(None), type, ModuleType)
_COLLECTIONS = (list, tuple, set, frozenset, deque)
_OF_OPTIMIZERS = frozenset({"state", "param_groups", "step"})
_LEAVES = (Tensor, nn.Module, Optimizer, ref)
# What classes of these have inside is their business: a Trainer leads to all that there is.
LIGHTNING = frozenset({"lightning", "pytorch_lightning"})
_NOT_SEARCHED = LIGHTNING | {"torch", "threading", "logging"}


# -- optimizers inside others ------------------------------------------------------------------------------------------


def listed(optimizers: Any) -> list[Any]:
    """Return optimizers as a list, also if it is a single one that was given.

    Args:
        optimizers: One optimizer or several, wrapped or not.
    """
    is_one = hasattr(optimizers, "param_groups")
    return [optimizers] if is_one else list(optimizers)


def with_inner(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Add the optimizers that others step with, as in sharpness-aware minimisation.

    Args:
        optimizers: Optimizers, wrapped by Lightning or not.

    Raises:
        TypeError: If one is no optimizer.
    """
    found: list[Optimizer] = []
    waiting = [unwrapped(optimizer) for optimizer in optimizers]
    for optimizer in waiting:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is no torch optimizer; pass the optimizers that train the model."
            )
        known = any(optimizer is other or optimizer.state is other.state for other in found)
        if not known:
            found.append(optimizer)
            waiting.extend(_inner(optimizer))  # looked at in this loop
    return found


def _inner(optimizer: Optimizer) -> Iterator[Any]:
    """Yield the optimizers that one holds, wherever."""
    for _, leaf in search(_attributes(optimizer)):
        if isinstance(leaf, Optimizer):
            yield unwrapped(leaf)


def unwrapped(optimizer: Any) -> Any:
    """Return what a wrapper wraps that has no state of its own, such as Lightning's."""
    wrapped = getattr(optimizer, "optimizer", optimizer)
    shares_state = getattr(wrapped, "state", None) is getattr(optimizer, "state", None)
    if isinstance(optimizer, Optimizer) and not shares_state:
        return optimizer
    return wrapped


# -- numbers elsewhere than in the state -------------------------------------------------------------------------------


def numbers_elsewhere(holder: Any, known: set[int]) -> Iterator[Found]:
    """Yield the tensors and arrays of more than one number that are not in the state of a parameter.

    Args:
        holder: An optimizer, or what wraps it.
        known: The ``id`` of all parameters and buffers of the model, and of all parameters that optimizers train.
    """
    values = list(_attributes(holder))
    if isinstance(holder, Optimizer):
        values += _state_elsewhere(holder, known)
    for place, leaf in search(values):
        for name, tensor in _tensors_of(leaf).items():
            if id(tensor) not in known and _size(tensor) > 1:
                yield place + name, tensor


def _tensors_of(leaf: Any) -> dict[str, Any]:
    """Return what is to be looked at of something that `search` has found, by what comes after its place."""
    if not isinstance(leaf, nn.Module):
        return {"": leaf}
    tensors = named_tensors(leaf)
    return {f".{name}": tensor for name, tensor in tensors.items()}


def leads_outside(leaf: Any) -> bool:
    """Tell whether what `search` has found leads to what is no business of a copy: the model, a Trainer."""
    opaque = isinstance(leaf, nn.Module | FunctionType | ref)
    return opaque or package_of(leaf) in LIGHTNING


def package_of(value: Any) -> str:
    """Return the name of the package that the class of a value is from."""
    return type(value).__module__.partition(".")[0]


def larger_tensors(value: Any) -> list[Any]:
    """Return the tensors and arrays of more than one number in a value, whatever it is made of."""
    return [leaf for _, leaf in search([("", value)]) if _size(leaf) > 1]


def shape_of(tensor: Any) -> str:
    """Return the shape of a tensor or array, as it is written in messages."""
    return str(tuple(tensor.shape))


def search(unsearched: Iterable[Found]) -> Iterator[Found]:
    """Yield what is in values, each with the place where it was found first.

    That is tensors, arrays, optimizers, and what `leads_outside`: functions that were made around something, for one.

    Args:
        unsearched: The values, each with its place.
    """
    waiting = deque(unsearched)
    seen: dict[int, Any] = {}  # which keeps what was made on the way, so that no two have the same id
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, _NOTHING_INSIDE) or id(value) in seen:
            continue
        seen[id(value)] = value
        is_leaf = isinstance(value, _LEAVES) or _is_array(value) or package_of(value) in LIGHTNING
        if is_leaf or _is_made_around_something(value):
            yield place, value
        if not is_leaf:
            waiting.extend(_inside(place, value))


def _inside(place: str, value: Any) -> Iterator[Found]:
    if isinstance(value, Mapping):
        yield from _items(place, value)
    elif isinstance(value, _COLLECTIONS):
        for index, item in enumerate(value):
            yield f"{place}[{index}]", item
    elif isinstance(value, FunctionType):
        yield from _closure(place, value)
    elif isinstance(value, MethodType):
        yield place, value.__self__
        yield place, value.__func__
    elif isinstance(value, partial):
        yield place, value.func
        yield place, value.args
        yield place, value.keywords
    elif package_of(value) not in _NOT_SEARCHED:
        for name, attribute in _own_attributes(value):
            yield f"{place}.{name}", attribute


def _items(place: str, items: Mapping[Any, Any]) -> Iterator[Found]:
    for key, item in items.items():
        written = repr(key) if isinstance(key, str | int) else "..."
        yield f"{place}[{written}]", item


def _closure(place: str, function: FunctionType) -> Iterator[Found]:
    names = function.__code__.co_freevars
    cells = function.__closure__ or ()
    for name, cell in zip(names, cells, strict=True):
        with suppress(ValueError):  # a cell may be empty
            yield f"{place}.{name}", cell.cell_contents


def _own_attributes(value: Any) -> Iterator[Found]:
    for kind in type(value).__mro__:
        for name in _slots(kind):
            if hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()


def _slots(kind: type) -> Iterator[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else slots
    for name in names:
        if not name.startswith("__"):
            yield name


def _shared_attributes(value: Any) -> Iterator[Found]:
    """Yield the collections that the class of a value has for all values."""
    for kind in type(value).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _NOT_SEARCHED:
            continue
        for name, attribute in vars(kind).items():
            if isinstance(attribute, dict | list | set):
                yield name, attribute


def _attributes(holder: Any) -> Iterator[Found]:
    """Yield the attributes of an optimizer, or of what wraps it, without its parameters and what it knows of each."""
    yield from _shared_attributes(holder)
    if not isinstance(holder, Optimizer):
        yield from _own_attributes(holder)
        return
    for name, value in _own_attributes(holder):
        is_hooks = name.startswith("_optimizer_")
        if name not in _OF_OPTIMIZERS and not is_hooks:
            yield name, value
    for index, group in enumerate(holder.param_groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        yield from _items(f"param_groups[{index}]", settings)


def _state_elsewhere(optimizer: Optimizer, known: set[int]) -> Iterator[Found]:
    """Yield the state that is not of a parameter."""
    for key, value in optimizer.state.items():
        of_parameter = isinstance(key, Tensor) and id(key) in known
        if not of_parameter:
            yield from _items("state", {key: value})


def _is_made_around_something(value: Any) -> bool:
    return isinstance(value, FunctionType) and bool(value.__closure__)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array_interface__")


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if _is_array(value):
        return int(value.size)
    return 0
