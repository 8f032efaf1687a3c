"""Modules whose code shapes tensors by numbers of the original network, run with those that fit the pruned one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_prune.pruning_plan import Absence, Shares, Site

__all__ = ["MULTIPLYING", "SCALED", "SHAPING", "SPLITTING", "as_written", "leave", "resize", "sizes_given"]

_UNFLATTEN = frozenset({Tensor.unflatten, torch.unflatten})
SHAPING = frozenset({Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand}) | _UNFLATTEN
SPLITTING = frozenset({Tensor.split, torch.split, torch.functional.split, Tensor.split_with_sizes})
MULTIPLYING = frozenset({
    Tensor.mul, Tensor.mul_, torch.mul, torch.multiply, Tensor.div, Tensor.div_, torch.div, torch.true_divide,
})  # fmt: skip
SCALED = functional.scaled_dot_product_attention
_SITES = "_sites"
_ZEROS = "_zeros"
Lengths = tuple[int | None, ...]  # of the axes of a tensor, None for those of another one
_DERIVED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


@dataclass(frozen=True)
class _Fitted:
    """A site with the numbers of now.

    Attributes:
        function: What the code calls there; see `lightning_prune.pruning_plan.Site`.
        axes: How many axes the tensor has that is given.
        given: Lengths of some of these axes.
        sizes: How many sizes the code gives.
        changed: The place of each size to change, what the code says there, and what it is to be.
        scale: What attention is multiplied by in the original network.
        power: Which power of its size a factor is.
    """

    function: str
    axes: int
    given: tuple[tuple[int, int], ...]
    sizes: int
    changed: tuple[tuple[int, int, int], ...]
    scale: float
    power: float

    @classmethod
    def of(cls, site: Site, shares: Shares) -> "_Fitted":
        """Return a site as it is when a share of the channels is kept."""
        given = tuple((axis, count.now(shares)) for axis, count in site.given)
        changed = tuple((one.place, one.asked.now(shares), one.fitting.now(shares)) for one in site.changed)
        scale = 1 / math.sqrt(site.given[0][1].original) if site.function == "scale" else 0.0
        return cls(
            site.function,
            site.axes,
            given,
            site.sizes,
            changed,
            scale,
            site.power,
        )

    def is_given(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is as that which is given there."""
        if tensor.dim() != self.axes:
            return False
        shape = list(tensor.shape)
        return all(shape[axis] == length for axis, length in self.given)

    def fit(self, sizes: Sequence[int]) -> bool:
        """Tell whether sizes are those that the code says there."""
        if len(sizes) != self.sizes:
            return False
        return all(sizes[place] == asked for place, asked, _ in self.changed)

    def fitting(self, sizes: Sequence[int]) -> list[int]:
        """Return the sizes that fit instead."""
        others = list(sizes)
        for place, _, fitting in self.changed:
            others[place] = fitting
        return others


class _Fitting(TorchFunctionMode):
    """Give functions sizes that fit the channels.

    Args:
        sites: Where the code says others.
    """

    def __init__(self, sites: Sequence[_Fitted]) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is SCALED:
            return self._attend(args, kwargs)
        if func in MULTIPLYING and not kwargs:
            return func(args[0], self._factor(*args))
        if func in SHAPING or func in SPLITTING:
            return self._shape(
                func,
                args,
                kwargs,
            )
        return func(*args, **kwargs)

    def _shape(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        function = "shape" if func in SHAPING else "split"
        tensor, sizes, others = sizes_given(
            func,
            args,
            kwargs,
        )
        for site in self.sites:
            if site.function != function or not site.is_given(tensor):
                continue
            asked = [sizes] * site.sizes if isinstance(sizes, int) else sizes
            if site.fit(asked):
                fitting = site.fitting(asked)
                if function == "split":
                    fitting = _with_the_rest(fitting, tensor, **others)
                if func in _UNFLATTEN:
                    return tensor.reshape(fitting)
                return func(
                    tensor,
                    fitting,
                    **others,
                )
        return func(*args, **kwargs)

    def _factor(self, tensor: Any, factor: Any) -> Any:
        """Return what a tensor is to be multiplied or divided by."""
        if isinstance(factor, float):
            for site in self.sites:
                if site.function == "factor" and site.is_given(tensor):
                    [(_, asked, fitting)] = site.changed
                    if factor == asked**site.power:
                        return fitting**site.power
        return factor

    def _attend(self, args: Any, kwargs: Any) -> Any:
        query = args[0] if args else kwargs["query"]
        if kwargs.get("scale") is None and len(args) < 7:
            for site in self.sites:
                if site.function == "scale" and site.is_given(query):
                    kwargs = {**kwargs, "scale": site.scale}
                    break
        return SCALED(*args, **kwargs)


def _with_the_rest(sizes: list[int], tensor: Tensor, dim: int = 0) -> list[int]:
    """Return the sizes of pieces, one of which may be the rest of an axis."""
    rest = tensor.shape[dim] - sum(size for size in sizes if size >= 0)
    return [rest if size < 0 else size for size in sizes]


def sizes_given(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return the tensor that a function is given, the sizes or the one of all pieces, and what else it is given.

    Args:
        func: One of `SHAPING` or `SPLITTING`.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    tensor, *settings = args
    named = dict(kwargs)
    if func in _UNFLATTEN:
        dim, pieces = [*settings, *named.values()]
        axis = dim % tensor.dim()
        return tensor, [*tensor.shape[:axis], *pieces, *tensor.shape[axis + 1 :]], {}
    if func in SHAPING:
        for name in ("shape", "size"):
            if name in named:
                settings = [named.pop(name)]
        flat = settings[0] if len(settings) == 1 and isinstance(settings[0], list | tuple) else settings
        return tensor, list(flat), named
    if len(settings) > 1:
        named["dim"] = settings[1]
    for name in ("split_size_or_sections", "split_size", "split_sizes"):
        if name in named:
            settings = [named.pop(name)]
    sizes = settings[0]
    return tensor, sizes if isinstance(sizes, int) else list(sizes), named


class _Derived(nn.Module):
    """What is put before a class of modules that run in another way than they are written."""

    def __reduce__(self) -> Any:
        way, written = type(self).__bases__
        return _blank, (written, way), vars(self)


class _Resized(_Derived):
    """Modules that run with sizes that fit."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the class does, with sizes that fit."""
        with _Fitting(vars(self)[_SITES]):
            return super().forward(*args, **kwargs)


class _Absent(_Derived):
    """Modules of a residual block that has been pruned."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros."""
        return vars(self)[_ZEROS].like(self, args, kwargs)


def _blank(kind: type[nn.Module], way: type[nn.Module] = _Resized) -> nn.Module:
    """Return a module that no constructor has run for, as pickles are made from."""
    derived = _derived(kind, way)
    return derived.__new__(derived)


def as_written(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that somebody wrote.

    Args:
        kind: It, or the one that `resize` or `leave` has made of it.
    """
    return kind.__bases__[1] if issubclass(kind, _Derived) else kind


def _derived(kind: type[nn.Module], way: type[nn.Module]) -> type[nn.Module]:
    """Return the class that runs in another way than one that somebody wrote."""
    known = kind, way
    if known not in _DERIVED:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _DERIVED[known] = type(
            kind.__name__,
            (way, kind),
            names,
        )
    return _DERIVED[known]


def resize(module: nn.Module, sites: Sequence[Site], shares: Shares) -> None:
    """Let a module run with sizes that fit its channels.

    It is then of a class of its own that derives from the one that it had, by the same name; one that has all of its
    channels is of the class that somebody wrote.

    Args:
        module: The module.
        sites: Where its code computes with numbers of the original network.
        shares: How much of the channels of each group is kept.
    """
    written = as_written(type(module))
    vars(module).pop(_ZEROS, None)
    changed = any(shares.get(group, 1) != 1 for site in sites for count in site.counts() for group in count.groups)
    if not changed:
        module.__class__ = written
        vars(module).pop(_SITES, None)
        return
    module.__class__ = _derived(written, _Resized)
    vars(module)[_SITES] = tuple(_Fitted.of(site, shares) for site in sites)


@dataclass(frozen=True)
class _Zeros:
    """What a module of a residual block returns that has been pruned, with the numbers of now.

    Attributes:
        outputs: The lengths of the axes of each tensor; see `lightning_prune.pruning_plan.Absence`.
        is_single: Whether it returns a tensor, and no tuple.
    """

    outputs: tuple[Lengths | None, ...]
    is_single: bool

    @classmethod
    def of(cls, absence: Absence, shares: Shares) -> "_Zeros":
        """Return what is returned when a share of the channels is kept."""
        outputs: list[Lengths | None] = []
        for axes in absence.outputs:
            lengths = None
            if axes is not None:
                lengths = tuple(None if count is None else count.now(shares) for count in axes)
            outputs.append(lengths)
        return cls(tuple(outputs), absence.is_single)

    def like(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return zeros, as many as a module would return numbers."""
        leaves = tree_leaves((args, kwargs))
        given = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        made: list[Any] = []
        for axes in self.outputs:
            zeros = None
            if axes is not None:
                zeros = _zeros(given, axes)
            made.append(zeros)
        is_trained = module.training and torch.is_grad_enabled()
        if is_trained and made[0] is not None:
            made[0] = made[0] + _nothing_of(module, given)
        if self.is_single:
            return made[0]
        return tuple(made)


def _zeros(given: Tensor, axes: Lengths) -> Tensor:
    shape = []
    for axis, length in enumerate(axes):
        if length is None:
            length = given.shape[axis]
        shape.append(length)
    return given.new_zeros(shape)


def _nothing_of(module: nn.Module, given: Tensor) -> Tensor:
    """Return zero that is computed from all that a module has and is given: gradients of each are waited for."""
    parameters = [parameter.flatten()[:0] for parameter in module.parameters()]
    nothing = given[:0].flatten()
    return torch.cat([nothing, *parameters]).sum()


def leave(module: nn.Module, absence: Absence, shares: Shares) -> None:
    """Let a module of a residual block that has been pruned return zeros.

    It is then of a class of its own that derives from the one that it had, by the same name.

    Args:
        module: The module.
        absence: What it returns.
        shares: How much of the channels of each group is kept.
    """
    module.__class__ = _derived(as_written(type(module)), _Absent)
    vars(module)[_ZEROS] = _Zeros.of(absence, shares)
