"""Replacing: many things are put in place at once, and if anything fails on the way, none of them."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_prune.graph.substitution import submodules
from lightning_prune.surgery.slicing import KeptByAxis, replace_data, take

__all__ = ["Replacement", "in_place", "of_attributes", "of_item", "of_slices", "of_tensor", "of_zeros", "uninterrupted"]


class Replacement(NamedTuple):
    """Something that is ready to be put in place of something else.

    Attributes:
        put: Puts it in place.
        undo: Puts back what was there before, also if `put` was not called, or broke off.
    """

    put: Callable[[], object]
    undo: Callable[[], object]


@contextmanager
def in_place(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Put replacements in place, for a block and for good; if anything is raised, there or here, undo all of them.

    Signals that Python code handles wait until the end of the block: a handler that saves the model would find half of
    it.

    Args:
        replacements: What is put in place, in this order; all of them are made before the first is put.

    Example:
        >>> sizes = {"width": 8}
        >>> with in_place([of_item(sizes, "width", 4)]):
        ...     raise MemoryError
        Traceback (most recent call last):
        MemoryError
        >>> sizes
        {'width': 8}
    """
    ready = list(replacements)
    begun = []
    with uninterrupted():
        try:
            for replacement in ready:
                begun.append(replacement)
                replacement.put()
            yield
        except BaseException:
            for replacement in reversed(begun):
                replacement.undo()
            raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals that Python code handles (Ctrl-C, a scheduler that wants a checkpoint) wait until the end of a block.

    They do so in the main thread, the only one that signals are handled in.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}
    waiting: list[int] = []
    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda received, _: waiting.append(received))
        yield
    finally:
        try:
            _restore(handlers)
        finally:
            _raise_all(waiting)


def _restore(handlers: dict[int, Any]) -> None:
    """Give signals their handlers back, also if one of these is called meanwhile and raises something."""
    try:
        while handlers:
            number, handler = next(iter(handlers.items()))
            signal.signal(number, handler)
            del handlers[number]
    finally:
        if handlers:
            _restore(handlers)


def _raise_all(waiting: list[int]) -> None:
    """Send signals to this process that have waited, also if a handler raises something."""
    try:
        while waiting:
            signal.raise_signal(waiting.pop(0))
    finally:
        if waiting:
            _raise_all(waiting)


def of_tensor(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> Replacement:
    """Replace the data and the gradient of a parameter or buffer, which stays the same object.

    Args:
        tensor: The parameter or buffer.
        data: Its new data, of any shape.
        gradient: Its new gradient, of the shape of the data.
    """
    put = partial(_set, tensor, data, gradient)
    undo = partial(_set, tensor, tensor.data, tensor.grad)
    return Replacement(put, undo)


def of_slices(tensor: Tensor, kept: KeptByAxis) -> Replacement:
    """Replace a parameter or buffer, and its gradient, by what is kept of it.

    Args:
        tensor: The parameter or buffer.
        kept: The positions of it to keep.
    """
    gradient = tensor.grad
    data = take(tensor.detach(), kept)
    if gradient is not None:
        gradient = take(gradient, kept)
    return of_tensor(tensor, data, gradient)


def of_zeros(tensor: Tensor, axis: int, positions: Tensor) -> Replacement:
    """Replace the values of a tensor at some positions along an axis by zeros.

    Args:
        tensor: A parameter or buffer.
        axis: The axis.
        positions: (n,) int64 positions along it.
    """
    positions = positions.to(tensor.device)
    values = tensor.detach().index_select(axis, positions)
    put = partial(tensor.detach().index_fill_, axis, positions, 0)
    undo = partial(tensor.detach().index_copy_, axis, positions, values)
    return Replacement(put, undo)


def of_item(items: MutableMapping[Any, Any], key: Any, value: Any) -> Replacement:
    """Replace an item of a mapping.

    Args:
        items: The mapping.
        key: The key of an item that is there.
        value: The new value.
    """
    put = partial(items.__setitem__, key, value)
    undo = partial(items.__setitem__, key, items[key])
    return Replacement(put, undo)


def of_attributes(model: nn.Module, put: Callable[[], object]) -> Replacement:
    """Replace attributes of submodules, other than submodules, parameters and buffers, and their classes.

    Args:
        model: The model.
        put: Sets the attributes.
    """
    modules = submodules(model)
    classes = [type(module) for module in modules]
    attributes = [vars(module) for module in modules]
    earlier = [dict(named) for named in attributes]

    def undo() -> None:
        for module, kind in zip(modules, classes, strict=True):
            module.__class__ = kind
        for named, before in zip(attributes, earlier, strict=True):
            for name in named.keys() - before.keys():
                del named[name]
            named.update(before)

    return Replacement(put, undo)


def _set(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> None:
    tensor.grad = None  # a gradient has to have the shape of the data
    replace_data(tensor, data)
    tensor.grad = gradient
