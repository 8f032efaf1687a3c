"""What optimizers hold: the optimizers inside them, and the numbers that lie elsewhere than in their state."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.substitution import named_tensors

__all__ = [
    "larger_tensors",
    "numbers_elsewhere",
    "package_of",
    "search",
    "shape_of",
    "unwrapped",
    "with_inner",
]

Found = tuple[str, Any]  # where something is, in Python, and what it is

_NOTHING_INSIDE = (str, bytes, int, float, complex, type(None), type, ModuleType)
_LEAVES = (Tensor, nn.Module, Optimizer, ref)
# What classes of these have inside is their business: a Trainer leads to all that there is.
_LIGHTNING = frozenset({"lightning", "pytorch_lightning"})
_NOT_SEARCHED = _LIGHTNING | {"torch", "threading", "logging"}


# -- optimizers inside others ------------------------------------------------------------------------------------------


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
            inside = search(_attributes(optimizer))
            waiting.extend(unwrapped(leaf) for _, leaf in inside if isinstance(leaf, Optimizer))  # in this loop
    return found


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
    for place, leaf in search(_attributes(holder)):
        tensors = _tensors_of(place, leaf) if isinstance(leaf, nn.Module) else [(place, leaf)]
        for name, tensor in tensors:
            if id(tensor) not in known and _size(tensor) > 1:
                yield name, tensor


def leads_outside(leaf: Any) -> bool:
    """Tell whether what `search` has found leads to what is no business of a copy: the model, a Trainer."""
    opaque = isinstance(leaf, nn.Module | FunctionType | ref)
    return opaque or package_of(leaf) in _LIGHTNING


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
        is_leaf = isinstance(value, _LEAVES) or _is_array(value) or package_of(value) in _LIGHTNING
        if is_leaf or _is_made_around_something(value):
            yield place, value
        if not is_leaf:
            waiting.extend(_inside(place, value))


def _inside(place: str, value: Any) -> Iterator[Found]:
    if isinstance(value, Mapping):
        yield from _items(place, value)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"{place}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        contents = zip(value.__code__.co_freevars, cells, strict=False)
        yield from ((f"{place}.{name}", getattr(cell, "cell_contents", None)) for name, cell in contents)
    elif isinstance(value, MethodType):
        yield place, value.__self__
        yield place, value.__func__
    elif isinstance(value, partial):
        yield place, (value.func, value.args, value.keywords)
    elif package_of(value) not in _NOT_SEARCHED:
        yield from ((f"{place}.{name}", attribute) for name, attribute in _attributes_of_object(value).items())


def _items(place: str, items: Mapping[Any, Any]) -> Iterator[Found]:
    for key, item in items.items():
        written = repr(key) if isinstance(key, str | int) else "..."
        yield f"{place}[{written}]", item


def _attributes(holder: Any) -> Iterator[Found]:
    """Yield the attributes of an optimizer, or of what wraps it, without its parameters and what it knows of each."""
    for kind in type(holder).__mro__:
        shared = vars(kind).items() if kind.__module__.partition(".")[0] not in _NOT_SEARCHED else ()
        yield from ((name, value) for name, value in shared if isinstance(value, dict | list | set))
    attributes = _attributes_of_object(holder)
    if not isinstance(holder, Optimizer):
        yield from attributes.items()
        return
    for name, value in attributes.items():
        if name not in ("state", "param_groups", "step") and not name.startswith("_optimizer_"):  # hooks
            yield name, value
    for index, group in enumerate(holder.param_groups):
        yield from ((f"param_groups[{index}][{name!r}]", value) for name, value in group.items() if name != "params")
    yield from _items("state", {key: value for key, value in holder.state.items() if not isinstance(key, Tensor)})


def _attributes_of_object(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**attributes, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _tensors_of(place: str, module: nn.Module) -> Iterator[Found]:
    return ((f"{place}.{name}", tensor) for name, tensor in named_tensors(module).items())


def _is_made_around_something(value: Any) -> bool:
    return isinstance(value, FunctionType) and bool(value.__closure__)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array_interface__")


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return int(value.size) if _is_array(value) else 0
