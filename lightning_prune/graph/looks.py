"""Looks: what code can decide about that has looked at a value of the network.

A number that is read from a tensor may decide what is done next, in other ways for other numbers. The function that has
read it knows it until it returns; then its caller knows it too, if anything but tensors is returned. What a function
can decide about is what it can reach: the tensors in its variables and, if there is a module among them, or if it may
put what it knows where others look, everything.
"""

import dis
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.frames import users_frame
from lightning_prune.graph.side_effects import SideEffects

__all__ = ["Looks"]

_LEADS_NOWHERE = (type, ModuleType, CodeType)
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_GENERATES = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_EXPRESSION = "<genexpr>"
_TELLS_OTHERS = ("STORE_ATTR", "STORE_GLOBAL", "RAISE_VARARGS")
_OF_TENSORS = (tuple, list)
_MOST = 10_000  # values that are followed


class _TooFarError(Exception):
    """A module can be reached, or too many values."""


class Looks:
    """The functions that have looked at values of the network, watched until they return.

    Args:
        below: The function whose frame on the call stack is a module that runs, by its code.
        note: Is called with the tensors that code can decide about which knows a value, or with None if that is the
            whole module.
    """

    def __init__(self, below: CodeType, note: Callable[[list[Tensor] | None], None]) -> None:
        self.below = below
        self.note = note
        self._watched: dict[FrameType, list[str]] = {}  # what each was given that can be changed
        self._effects = SideEffects()
        self._traced_before: Any = None

    @property
    def pending(self) -> bool:
        """Whether a function runs that knows a value and has not returned."""
        return bool(self._watched)

    def add(self) -> None:
        """Note that the code which runs now has looked at a value."""
        frame = users_frame(sys._getframe(1), self.below)
        self._tell(frame)

    def _tell(self, frame: FrameType | None) -> None:
        """Note that a function knows a value; None if it is that of the module."""
        try:
            if frame is None or _may_keep(frame.f_code):
                raise _TooFarError
            if self._effects.of_code(frame.f_code, frame.f_globals):
                raise _TooFarError
            reached, _ = _all_in(frame.f_locals.values(), self._effects)
            given = _changeable(frame)
        except _TooFarError:
            self.note(None)
            return
        self.note(reached)
        if frame.f_code.co_name == _EXPRESSION:  # it tells what it knows at once
            caller = users_frame(frame.f_back, self.below)
            self._tell(caller)
        elif frame not in self._watched:
            self._watch(frame)
            self._watched[frame] = given

    def _watch(self, frame: FrameType) -> None:
        """Be told when a function returns."""
        if not self._watched:
            self._traced_before = sys.gettrace()
            sys.settrace(_follow_nothing)
        frame.f_trace = self._on_event
        frame.f_trace_lines = False

    def _on_event(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "return":
            given = self._watched.pop(frame)
            self._on_return(frame, given, value)
            if not self._watched:
                sys.settrace(self._traced_before)
        return self._on_event

    def _on_return(self, frame: FrameType, given: list[str], value: Any) -> None:
        """Go on with the caller, unless a function has returned tensors and changed nothing else."""
        try:
            reached, _ = _all_in([value, *frame.f_locals.values()])
            tells = not _is_of_tensors(value) or _changeable(frame) != given
        except _TooFarError:
            self.note(None)
            return
        self.note(reached)
        for tensor in reached:
            tensor._is_of_network = True  # type: ignore[attr-defined]
        if tells:
            caller = users_frame(frame.f_back, self.below)
            self._tell(caller)


def _follow_nothing(frame: FrameType, event: str, value: Any) -> None:
    """Trace no function that is called from now on."""


@functools.cache
def _may_keep(code: CodeType) -> bool:
    """Tell whether a function may keep values where others look, or raise for some."""
    if code.co_flags & _GENERATES and code.co_name != _EXPRESSION:
        return True
    for instruction in dis.get_instructions(code):
        if instruction.opname in _TELLS_OTHERS:
            return True
        if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return True
    return False


def _is_of_tensors(value: Any) -> bool:
    """Tell whether a value is a tensor, or nested ones."""
    if isinstance(value, dict):
        return all(map(_is_of_tensors, value.values()))
    if isinstance(value, _OF_TENSORS):
        return all(map(_is_of_tensors, value))
    return isinstance(value, Tensor)


def _changeable(frame: FrameType) -> list[str]:
    """Return the plain values in all that a function was given from outside, but not those themselves."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS)
    count += bool(code.co_flags & inspect.CO_VARKEYWORDS)
    variables = frame.f_locals
    names = [*code.co_varnames[:count], *code.co_freevars]
    given = [variables[name] for name in names if name in variables]
    _, plain = _all_in(value for value in given if not isinstance(value, _PLAIN))
    return plain


def _all_in(values: Iterable[Any], effects: SideEffects | None = None) -> tuple[list[Tensor], list[str]]:
    """Return the tensors that can be reached from some values, and all else that leads nowhere, as it is shown.

    Args:
        values: Any values.
        effects: Tells of functions and objects whether they may be called.

    Raises:
        _TooFarError: If that is a module, something that may not be called, or too many.
    """
    waiting = list(values)
    seen = {}
    tensors, others = [], []
    while waiting:
        value = waiting.pop()
        if isinstance(value, _PLAIN):
            others.append(repr(value))
        elif id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, nn.Module) or len(seen) > _MOST:
                raise _TooFarError
            if isinstance(value, Tensor):
                tensors.append(value)
            elif not isinstance(value, _LEADS_NOWHERE):
                if effects is not None and effects.of_value(value):
                    raise _TooFarError
                found = _behind(value)
                waiting += found
                others += [] if found else [repr(value)]
    return tensors, others


def _behind(value: Any) -> list[Any]:
    """Return what a value refers to; of a function, what it has taken along."""
    if not isinstance(value, FunctionType):
        return gc.get_referents(value)
    named = value.__kwdefaults__ or {}
    return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *named.values()]
