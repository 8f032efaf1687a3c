"""Frames of the call stack: which line of somebody's code runs now, and inside which functions."""

import inspect
import os
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

__all__ = [
    "SourceLine",
    "autograd_functions",
    "first_on_stack",
    "is_on_stack",
    "raising_line",
    "running_line",
    "users_frame",
]

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_THIS_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_GENERATED = "<"  # as in "<string>"
_NOT_OF_USERS = (_TORCH, _THIS_PACKAGE, _GENERATED)


class SourceLine(NamedTuple):
    """A line of somebody's code; without a file where there is none.

    Example:
        >>> f"fails{SourceLine('/home/me/net.py', 12)}"
        'fails (net.py:12)'
        >>> f"fails{SourceLine()}"
        'fails'
    """

    file: str = ""
    number: int = 0

    def __str__(self) -> str:
        if not self.file:
            return ""
        name = os.path.basename(self.file)
        return f" ({name}:{self.number})"

    def __format__(self, specification: str) -> str:
        return format(str(self), specification)


@cache
def _is_of_users(file: str) -> bool:
    """Tell whether the code in a file belongs neither to torch nor to this package."""
    return not file.startswith(_NOT_OF_USERS)


def running_line() -> SourceLine:
    """Return the innermost line of somebody's code that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_of_users(frame.f_code.co_filename):
            return SourceLine(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return SourceLine()


def raising_line(raised: Exception) -> SourceLine:
    """Return the innermost line of somebody's code that an exception went through."""
    line = SourceLine()
    trace = raised.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_of_users(code.co_filename):
            line = SourceLine(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return line


def users_frame(frame: FrameType | None, below: CodeType) -> FrameType | None:
    """Return the innermost function that is somebody's, from one on outwards, of those called by another.

    Args:
        frame: The frame to start with.
        below: The other function, by its code.
    """
    while frame is not None and frame.f_code is not below:
        if _is_of_users(frame.f_code.co_filename):
            return frame
        frame = frame.f_back
    return None


def is_on_stack(code: CodeType, below: CodeType) -> bool:
    """Tell whether a function runs that was called, directly or not, by the innermost run of another.

    Args:
        code: The function, by its code.
        below: The other function.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not below:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def first_on_stack(names: dict[CodeType, str], below: CodeType) -> str:
    """Return the name of the innermost function that runs, of those called by the innermost run of another.

    Args:
        names: The names of functions, by their code.
        below: The other function.

    Returns:
        The name; empty if none of the functions runs.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not below:
        if frame.f_code in names:
            return names[frame.f_code]
        frame = frame.f_back
    return ""


def autograd_functions() -> dict[CodeType, str]:
    """Return the names of all autograd functions that are not part of torch, by the code of their forward function."""
    return dict(_autograd_functions_below(torch.autograd.Function))


def _autograd_functions_below(kind: Any) -> Iterator[tuple[CodeType, str]]:
    for function in kind.__subclasses__():
        if not function.__module__.startswith("torch."):  # which has two hundred
            code = getattr(inspect.unwrap(function.forward), "__code__", None)
            if code is not None and _is_of_users(code.co_filename):
                yield code, function.__name__
        yield from _autograd_functions_below(function)
