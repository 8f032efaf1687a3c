"""Side effects: whether a function may put what it knows where others look, as far as its code tells.

A function is trusted if all that it names and was not given is trusted: the functions of a few packages, plain values,
and functions and classes of which the same is true. Lists and objects that are global are not, nor are loggers, caches
and modules of other packages.
"""

import builtins
import dis
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["SideEffects"]

_TRUSTED_PACKAGES = {
    "abc", "builtins", "collections", "dataclasses", "math", "numpy", "reprlib", "torch", "torchvision", "typing",
}  # fmt: skip
_NOT_TRUSTED = {"delattr", "eval", "exec", "globals", "open", "setattr", "vars"}  # of the builtins
_PLAIN = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_CHANGEABLE = (list, dict, set, bytearray)
_LEADS_TO_CLASSES = {"__class__", "type"}
_REBINDS = ("STORE_GLOBAL", "DELETE_GLOBAL")


class SideEffects:
    """Tells which functions may put what they know where others look; remembers what it has found."""

    def __init__(self) -> None:
        self._trusted: dict[Any, bool] = {}  # by code or class

    def of_code(self, code: CodeType, variables: Mapping[str, Any]) -> bool:
        """Tell whether code may do so, but by what it was given.

        Args:
            code: The code of a function.
            variables: The global variables that it sees.
        """
        if code not in self._trusted:
            self._trusted[code] = True  # where functions call each other, the others decide
            self._trusted[code] = self._is_code_trusted(code, variables)
        return not self._trusted[code]

    def of_value(self, value: Any) -> bool:
        """Tell whether a function, or a method of an object, may do so that was given to somebody."""
        if isinstance(value, FunctionType):
            return self.of_code(value.__code__, value.__globals__)
        return not self._is_class_trusted(type(value))

    def _is_code_trusted(self, code: CodeType, variables: Mapping[str, Any]) -> bool:
        if _changes_classes(code, variables):
            return False
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname in _REBINDS:
                return False
            if instruction.opname == "IMPORT_NAME" and _package(name) not in _TRUSTED_PACKAGES:
                return False
            if instruction.opname == "LOAD_GLOBAL" and not self._is_named_trusted(name, variables):
                return False
            if isinstance(name, CodeType) and self.of_code(name, variables):
                return False
        return True

    def _is_named_trusted(self, name: str, variables: Mapping[str, Any]) -> bool:
        if name in variables:
            return self._is_trusted(variables[name])
        return name not in _NOT_TRUSTED and hasattr(builtins, name)

    def _is_trusted(self, value: Any) -> bool:
        """Tell whether a global variable, or what a function has taken along, can be used without side effects."""
        if isinstance(value, _PLAIN):
            return True
        if isinstance(value, tuple):
            return self._are_trusted(value)
        if isinstance(value, ModuleType):
            return _package(value.__name__) in _TRUSTED_PACKAGES
        if isinstance(value, type):
            return self._is_class_trusted(value)
        if isinstance(value, BuiltinFunctionType):
            return _package(value.__module__) in _TRUSTED_PACKAGES
        if isinstance(value, FunctionType):
            return self._is_function_trusted(value)
        return False

    def _are_trusted(self, values: Iterable[Any]) -> bool:
        return all(map(self._is_trusted, values))

    def _is_function_trusted(self, function: FunctionType) -> bool:
        if _package(function.__module__) in _TRUSTED_PACKAGES:
            return True
        cells = function.__closure__ or ()
        taken_along = [cell.cell_contents for cell in cells]
        taken_along += function.__defaults__ or ()
        if not self._are_trusted(taken_along):
            return False
        return not self.of_code(function.__code__, function.__globals__)

    def _is_class_trusted(self, kind: type) -> bool:
        """Tell whether the methods of a class can be called without side effects but on what they are given."""
        if kind not in self._trusted:
            self._trusted[kind] = True
            self._trusted[kind] = self._are_methods_trusted(kind)
        return self._trusted[kind]

    def _are_methods_trusted(self, kind: type) -> bool:
        for parent in kind.__mro__:
            if _package(parent.__module__) in _TRUSTED_PACKAGES:
                continue
            members = vars(parent)
            own = [value for name, value in members.items() if not name.startswith("__")]
            if any(isinstance(value, _CHANGEABLE) for value in own):
                return False
            for method in map(_function_of, members.values()):
                if method is not None and self.of_code(method.__code__, method.__globals__):
                    return False
        return True


def _changes_classes(code: CodeType, variables: Mapping[str, Any]) -> bool:
    """Tell whether code sets attributes, and names a class of somebody's, whose attributes all can see."""
    instructions = list(dis.get_instructions(code))
    if not any(instruction.opname == "STORE_ATTR" for instruction in instructions):
        return False
    names = {instruction.argval for instruction in instructions if isinstance(instruction.argval, str)}
    if names & _LEADS_TO_CLASSES:
        return True
    named = [variables.get(name) for name in names]
    return any(isinstance(value, type) and _package(value.__module__) not in _TRUSTED_PACKAGES for value in named)


def _function_of(member: Any) -> FunctionType | None:
    """Return the function that a member of a class runs, if it is somebody's own."""
    inner = getattr(member, "__func__", member)
    inner = getattr(inner, "fget", inner)
    is_own = isinstance(inner, FunctionType) and _package(inner.__globals__.get("__name__")) not in _TRUSTED_PACKAGES
    return inner if is_own else None


def _package(module: str | None) -> str:
    """Return the package of a module."""
    return (module or "").partition(".")[0]
