"""Twins: the modules of a model once more, to be run in its place so that the model itself is left as it was.

A forward pass may write to its modules whatever it likes: counters, caches, hooks and submodules that it makes on first
use. A twin has modules, hooks, collections and objects of its own, which refer to each other as those of the model do,
so that nothing of this reaches the model, and whoever looks at the model meanwhile (a checkpoint that is written in
another thread or by a signal handler) finds its own tensors.

What is not part of a network is not made anew: functions and objects that can be imported, data sets, optimizers, the
trainer, and what belongs to Python, PyTorch or Lightning.
"""

import copy
import random
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial, singledispatch
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook, register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.hooks import RemovableHandle

from lightning_prune.graph.neutral import preserving_random_state
from lightning_prune.graph.sizes import has_registered_sizes, sync_attributes
from lightning_prune.graph.substitution import named_submodules, submodules
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["NotATwinError", "Twin", "refusing_calls", "set_mode", "twin_in_evaluation"]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})
_NOT_OF_THE_NETWORK = frozenset({"_trainer", "_fabric"})  # attributes by which Lightning's modules know who runs them
_COMPILED = "_compiled_call_impl"  # what `nn.Module.compile` leaves; it runs the model itself
_AS_WRITTEN = "_torchdynamo_orig_callable"  # on compiled functions
_CONTAINERS = (dict, set)
_OF_MODULES = {name: type(value) for name, value in vars(nn.Module()).items() if isinstance(value, _CONTAINERS)}
_SHARED_KINDS = (type, ModuleType, Enum, Dataset, DataLoader, Sampler, torch.optim.Optimizer, PruningPlan)
_SHARED_PACKAGES = sys.stdlib_module_names | {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}
_OWN_KINDS = (SimpleNamespace, RemovableHandle, _WrappedHook)  # of these packages


class Twin:
    """The modules of a model once more, with tensors, hooks, collections and objects of their own.

    Args:
        model: The model; it is not changed, now or when the twin runs.
        stand_ins: What takes the place of each parameter and buffer, by the ``id`` of the tensor; those that are
            absent are copied. Size attributes are in step with them.

    Attributes:
        model: The twin of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False))
        >>> twin = Twin(model, {id(model[0].weight): torch.zeros(2, 3)})
        >>> twin.model[0], twin.of(model[0]) is twin.model[0]
        (Linear(in_features=3, out_features=2, bias=False), True)
        >>> model[0]
        Linear(in_features=3, out_features=4, bias=False)
    """

    def __init__(self, model: nn.Module, stand_ins: Mapping[int, Tensor] | None = None) -> None:
        self._stand_ins = stand_ins or {}
        self._counterparts: dict[int, Any] = dict(self._stand_ins)  # by id of what they stand for
        self._originals: list[Any] = []  # as long as they are there, their ids mean them
        self._functions: dict[Any, Callable[[Any, Twin], Any]] = {}  # by kind, looked up once
        self._slots: dict[type, list[str]] = {}  # by class
        self._to_fill: deque[Callable[[], None]] = deque()
        self._resized: list[nn.Module] = []
        self._modules = submodules(model)
        self.model = self.of(model)

    def __contains__(self, value: Any) -> bool:
        """Tell whether the twin has something in place of a value."""
        return id(value) in self._counterparts

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield each submodule of the model with its counterpart, but for those that are scripted."""
        for module in self._modules:
            if not isinstance(module, torch.jit.ScriptModule):
                yield module, self._counterparts[id(module)]

    def of(self, value: Any) -> Any:
        """Return what the twin has in place of a submodule, a bound method or anything else of the model."""
        counterpart = self.counterpart(value)
        while self._to_fill:
            self._to_fill.popleft()()
        while self._resized:
            sync_attributes(self._resized.pop())
        return counterpart

    # -- what the functions below are written with -------------------------------------------------------------------

    def counterpart(self, value: Any) -> Any:
        """Return what the twin has in place of a value; what is in it may come later."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        known = self._counterparts.get(id(value), self)
        if known is not self:
            return known
        make = self._functions.get(kind)
        if make is None:
            make = self._functions[kind] = _counterpart.dispatch(kind)
        return make(value, self)

    def note(self, value: Any, counterpart: Any, fill: Callable[[], None] | None = None) -> Any:
        """Note what the twin has in place of a value, and what fills it, before anything looks for what is in it."""
        self._originals.append(value)
        self._counterparts[id(value)] = counterpart
        if fill is not None:
            self._to_fill.append(fill)
        return counterpart

    def fill_attributes(self, value: Any, counterpart: Any) -> None:
        """Give an object the counterparts of the attributes of another."""
        attributes = vars(counterpart)
        for name, attribute in vars(value).items():
            if type(attribute) in _PLAIN or name in _NOT_OF_THE_NETWORK:
                attributes[name] = attribute
            elif _OF_MODULES.get(name) is type(attribute) and not attribute:  # every module has a dozen
                attributes[name] = type(attribute)()
            else:
                attributes[name] = self.counterpart(attribute)

    def slots(self, kind: type) -> list[str]:
        """Return the names of the slots of a class and of those that it inherits from, looked up once."""
        if kind not in self._slots:
            self._slots[kind] = _slots(kind)
        return self._slots[kind]

    def note_sizes(self, module: nn.Module, counterpart: nn.Module) -> None:
        """Note that the sizes of the counterpart of a module may be others, if they may."""
        if self._stand_ins and has_registered_sizes(module):
            self._resized.append(counterpart)
            return
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if id(tensor) in self._stand_ins and self._stand_ins[id(tensor)].shape != tensor.shape:  # type: ignore[union-attr]
                self._resized.append(counterpart)
                return


# -- what takes the place of values, by their kind ---------------------------------------------------------------------


@singledispatch
def _counterpart(value: Any, twin: Twin) -> Any:
    """Return what a twin has in place of a value: for an object, one of the same class, unless it is shared."""
    if _is_shared(value):
        return value
    blank = _blank(type(value))
    if blank is None:
        return value
    return twin.note(value, blank, partial(_fill_object, value, blank, twin))


def _blank(kind: Any) -> Any:
    """Return an object that no constructor has run for; None where that cannot be."""
    for base in (object, kind):
        with suppress(TypeError):  # of what is not made of Python alone, or takes arguments
            return base.__new__(kind)
    return None


def _is_shared(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, _OWN_KINDS):
        return False
    if isinstance(value, _SHARED_KINDS) or kind.__module__.partition(".")[0] in _SHARED_PACKAGES:
        return True
    # Of two objects that release something in the end, one would release it too early.
    return hasattr(kind, "__del__") or not (hasattr(value, "__dict__") or _slots(kind))


def _fill_object(value: Any, blank: Any, twin: Twin) -> None:
    if hasattr(value, "__dict__"):
        twin.fill_attributes(value, blank)
    for name in twin.slots(type(value)):
        if hasattr(value, name):
            object.__setattr__(blank, name, twin.counterpart(getattr(value, name)))


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for base in kind.__mro__:
        declared = vars(base).get("__slots__", ())
        names += [declared] if isinstance(declared, str) else declared
    return [name for name in names if name not in ("__dict__", "__weakref__")]


@_counterpart.register
def _of_tensor(tensor: Tensor, twin: Twin) -> Any:
    is_parameter = isinstance(tensor, nn.Parameter)
    copied = copy.deepcopy(tensor) if is_parameter else tensor.detach().clone()
    vars(copied).update(vars(tensor))
    return twin.note(tensor, copied)


@_counterpart.register
def _of_module(module: nn.Module, twin: Twin) -> Any:
    blank = object.__new__(type(module))

    def fill() -> None:
        _fill_object(module, blank, twin)
        vars(blank).pop(_COMPILED, None)
        twin.note_sizes(module, blank)

    return twin.note(module, blank, fill)


@_counterpart.register
def _of_script(module: torch.jit.ScriptModule, twin: Twin) -> Any:
    copied = copy.deepcopy(module)  # what is scripted is not made of Python
    for original, counterpart in zip(module.modules(), copied.modules(), strict=True):
        twin.note(original, counterpart)
        pairs = (original._parameters, counterpart._parameters), (original._buffers, counterpart._buffers)
        for own_tensors, tensors in pairs:
            for name, tensor in own_tensors.items():
                tensors[name] = twin.counterpart(tensor)
    return copied


@_counterpart.register
def _of_dict(values: dict, twin: Twin) -> Any:
    kind: Any = type(values)
    blank = kind.__new__(kind)
    # Those of subclasses may do more than to set an item; an OrderedDict has to note the order.
    put = OrderedDict.__setitem__ if isinstance(values, OrderedDict) else dict.__setitem__

    def fill() -> None:
        if isinstance(values, defaultdict):
            blank.default_factory = twin.counterpart(values.default_factory)
        for key, value in dict.items(values):
            counterpart_of_key = key if type(key) is str else _of_key(key, twin)
            put(blank, counterpart_of_key, twin.counterpart(value))
        if kind not in (dict, OrderedDict, defaultdict) and hasattr(values, "__dict__"):
            twin.fill_attributes(values, blank)

    return twin.note(values, blank, fill)


def _of_key(key: Any, twin: Twin) -> Any:
    """Return what takes the place of a key: others than modules and tensors go by what they say, not by what is in."""
    return twin.counterpart(key) if isinstance(key, nn.Module | Tensor) else key


@_counterpart.register(list)
@_counterpart.register(deque)
def _of_sequence(values: Any, twin: Twin) -> Any:
    kind: Any = type(values)
    blank = kind([], values.maxlen) if isinstance(values, deque) else kind.__new__(kind)

    def fill() -> None:
        is_plain = set(map(type, values)) <= _PLAIN  # as thousands of numbers of positions are
        blank.extend(values if is_plain else [twin.counterpart(value) for value in values])
        if kind not in (list, deque) and hasattr(values, "__dict__"):
            twin.fill_attributes(values, blank)

    return twin.note(values, blank, fill)


@_counterpart.register
def _of_set(values: set, twin: Twin) -> Any:
    blank = type(values).__new__(type(values))

    def fill() -> None:
        for value in values:
            blank.add(_of_key(value, twin))

    return twin.note(values, blank, fill)


@_counterpart.register
def _of_tuple(values: tuple, twin: Twin) -> Any:
    counterparts = [twin.counterpart(value) for value in values]
    pairs = zip(values, counterparts, strict=True)
    if all(one is other for one, other in pairs):
        return values
    return twin.note(values, tuple.__new__(type(values), counterparts))


@_counterpart.register
def _of_function(function: FunctionType, twin: Twin) -> Any:
    as_written = vars(function).get(_AS_WRITTEN)
    if as_written is not None:
        return twin.counterpart(as_written)
    if _is_importable(function):
        return function
    cells = tuple(twin.counterpart(cell) for cell in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    copied.__qualname__ = function.__qualname__

    def fill() -> None:
        copied.__defaults__ = twin.counterpart(function.__defaults__)
        copied.__kwdefaults__ = twin.counterpart(function.__kwdefaults__)
        twin.fill_attributes(function, copied)

    return twin.note(function, copied, fill)


def _is_importable(function: FunctionType) -> bool:
    module: Any = sys.modules.get(function.__module__)
    found = module
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return function in (found, getattr(module, function.__name__, None))


@_counterpart.register
def _of_cell(cell: CellType, twin: Twin) -> Any:
    blank = CellType()

    def fill() -> None:
        with suppress(ValueError):  # a variable of an outer function that has no value yet
            blank.cell_contents = twin.counterpart(cell.cell_contents)

    return twin.note(cell, blank, fill)


@_counterpart.register
def _of_method(method: MethodType, twin: Twin) -> Any:
    function, owner = twin.counterpart(method.__func__), twin.counterpart(method.__self__)
    return twin.note(method, MethodType(function, owner))


@_counterpart.register
def _of_builtin_method(method: BuiltinMethodType, twin: Twin) -> Any:
    owner = twin.counterpart(method.__self__)
    return method if owner is method.__self__ else getattr(owner, method.__name__)


@_counterpart.register
def _of_partial(bound: partial, twin: Twin) -> Any:
    function = twin.counterpart(bound.func)
    args = twin.counterpart(bound.args)
    named = twin.counterpart(bound.keywords)
    made = type(bound)(function, *args)
    made.keywords.update(named)  # which may be filled later
    return twin.note(bound, made, lambda: made.keywords.update(named))


@_counterpart.register
def _of_reference(reference: weakref.ReferenceType, twin: Twin) -> Any:
    referent = reference()
    if referent is None or type(reference) is not weakref.ReferenceType:
        return reference
    counterpart = twin.counterpart(referent)
    return reference if counterpart is referent else weakref.ref(counterpart)


@_counterpart.register
def _of_generator(generator: torch.Generator, twin: Twin) -> Any:
    return twin.note(generator, generator.clone_state())


@_counterpart.register(np.ndarray)
@_counterpart.register(np.random.Generator)
@_counterpart.register(np.random.RandomState)
@_counterpart.register(random.Random)
@_counterpart.register(bytearray)
def _of_numbers(value: Any, twin: Twin) -> Any:
    return twin.note(value, copy.deepcopy(value))


# -- running a twin ----------------------------------------------------------------------------------------------------


def set_mode(model: nn.Module, training: bool) -> None:
    """Put every submodule in training or evaluation mode.

    The flags are set directly: the ``train`` method of somebody's class may do more than set them.

    Args:
        model: The model.
        training: Whether it is training mode.
    """
    for module in submodules(model):
        if module.training == training:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            module.training = training
        else:
            vars(module)["training"] = training


@contextmanager
def twin_in_evaluation(model: nn.Module) -> Iterator[Twin]:
    """Make a twin of a model in evaluation mode, to be measured; give the random state back as it was.

    Args:
        model: The model.

    Example:
        >>> model = nn.Dropout()
        >>> with twin_in_evaluation(model) as twin:
        ...     model.training, twin.model.training
        (True, False)
    """
    with torch.inference_mode(False), preserving_random_state(model):
        twin = Twin(model)
        set_mode(twin.model, training=False)
        yield twin


class NotATwinError(ValueError):
    """A module of the model itself was about to run where only its twin may."""


@contextmanager
def refusing_calls(model: nn.Module) -> Iterator[None]:
    """Raise a `NotATwinError` if this thread runs a layer of a model itself, by a reference that no twin follows.

    Args:
        model: The model.
    """
    names = {id(module): name for name, module in named_submodules(model).items() if module._parameters}
    thread = threading.get_ident()

    def refuse(module: nn.Module, args: Any) -> None:
        if id(module) in names and threading.get_ident() == thread:
            raise NotATwinError(
                f"{names[id(module)]!r} of {type(model).__name__} is run by a global variable, or by one of an outer "
                "function, which always means the model itself; run it as an attribute of the module that `forward` "
                "or `evaluate` is given."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        with warnings.catch_warnings():
            # Of a compiled module: such a hook is called twice, which does not matter here.
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        handle.remove()
