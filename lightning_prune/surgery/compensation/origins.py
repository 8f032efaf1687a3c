"""Origins: which rows of which weights made the channels of a tensor, as long as nothing but its shape has changed."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.surgery.compensation.operators import Linear
from lightning_prune.surgery.compensation.survey import ByTensor

__all__ = ["Origin", "Origins", "rows_along"]

_VIEWS = {
    "__get__",
    "__getitem__",
    "chunk",
    "expand",
    "flatten",
    "movedim",
    "narrow",
    "permute",
    "repeat",
    "repeat_interleave",
    "reshape",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "tensor_split",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}
_COPIES = {
    "bfloat16",
    "clone",
    "contiguous",
    "detach",
    "double",
    "dropout",
    "float",
    "half",
    "to",
    "type_as",
}
_FACTORS = {
    "__mul__",
    "__rmul__",
    "__truediv__",
    "div",
    "mul",
    "multiply",
    "true_divide",
}
_UNREAD = {
    "full_like",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones_like",
    "zeros_like",
}


@dataclass(frozen=True)
class Origin:
    """Where the channels of a tensor come from.

    Attributes:
        weight: Name of the weight of the layer.
        rows: Of the shape of the tensor: the row of the weight that made each number, but for a factor that all have in
            common; None once something else was done to them.
        bias: Name of the bias that goes with the weight; empty if there is none.
        shift: How far behind those of the weight the rows of the bias lie, of which the weight may have been taken out.
        is_made: Whether it is what a layer returned, or made of that; else it is the weight, or made of it.
    """

    weight: str
    rows: Tensor | None
    bias: str = ""
    shift: int = 0
    is_made: bool = False


class Origins:
    """The origins of the tensors of a forward pass.

    Args:
        names: The name of each tensor of the model by its ``id``.

    Attributes:
        used: Rows of weights whose channels are computed with, by the names of these.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.used: dict[str, set[int]] = defaultdict(set)
        self._names = names
        self._origins: ByTensor[Origin] = ByTensor()

    def of(self, tensor: Any) -> Origin | None:
        """Return the origin of a tensor, if anything is known of it."""
        found = self._origins.get(tensor)
        if found is not None:
            return found
        name = self._names.get(id(tensor))
        if name is None or not tensor.dim():
            return None
        rows = torch.arange(len(tensor), dtype=torch.int32, device=tensor.device)
        return Origin(name, _spread(rows, 0, tensor))

    def use(self, tensor: Any) -> None:
        """Note that something computes with the channels of a tensor."""
        origin = self.of(tensor)
        if origin is None or origin.rows is None:
            return
        rows = _without_repeats(origin.rows)
        distinct = rows.unique().tolist()
        self.used[origin.weight].update(distinct)

    def viewed(self, tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a view of a tensor that has an origin, which has one too.

        Args:
            tensor: The tensor.
            view: Makes the view, and those of its rows.
        """
        seen = view(tensor)
        origin = self.of(tensor)
        if origin is not None:
            rows = None if origin.rows is None else view(origin.rows)
            self._origins.set(seen, replace(origin, rows=rows))
        return seen

    def follow_layer(self, layer: Linear, output: Tensor) -> None:
        """Note what a layer returned.

        Args:
            layer: Its call.
            output: What it returned.
        """
        self.use(layer.given)
        weight = self.of(layer.weight)
        if weight is None:
            return
        made = replace(weight, rows=None, is_made=True)
        if weight.rows is not None and layer.groups == 1 and not layer.transposed:
            made = self._with_bias(made, rows_along(weight.rows, 0), layer.bias)
        if made.rows is not None:
            spatial = len(layer.stride)
            axis = output.dim() - 1 - spatial
            made = replace(made, rows=_spread(made.rows, axis, output))
        self._origins.set(output, made)

    def _with_bias(self, made: Origin, rows: Tensor | None, bias: Tensor | None) -> Origin:
        """Return an origin with rows, and with the bias that goes with these; without rows if there is no such."""
        if bias is None or rows is None:
            return replace(made, rows=rows)
        of_bias = self.of(bias)
        if of_bias is None or of_bias.rows is None:
            return made
        shifts = (of_bias.rows - rows).unique().tolist()
        if len(shifts) > 1:
            return made
        return replace(made, rows=rows, bias=of_bias.weight, shift=shifts[0])

    def follow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note what a function that is no layer returned.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its named arguments.
            output: What it returned.
        """
        name = getattr(func, "__name__", "")
        if name in _UNREAD:
            return
        known = self._known(args, kwargs)
        if not known:
            return
        if _writes(name):
            for one in known:
                self.use(one)
        returned = _tensors(output)
        [source, *others] = known
        origin = self.of(source)
        assert origin is not None
        moved: Sequence[Tensor] = []
        if origin.rows is not None:
            moved = _moved(func, args, kwargs, source, origin.rows)
        is_followed = len(moved) == len(returned)
        if returned and not is_followed:
            self.use(source)
        for one in others:
            self.use(one)
        for number, one in enumerate(returned):
            rows = None
            if is_followed and moved[number].shape == one.shape:
                rows = moved[number]
            self._origins.set(one, replace(origin, rows=rows))

    def _known(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the arguments that something is known of, those that layers have made first."""
        made = []
        weights = []
        for one in _tensors((args, kwargs)):
            origin = self.of(one)
            if origin is None:
                continue
            if origin.is_made:
                made.append(one)
            else:
                weights.append(one)
        return made + weights


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or outputs."""
    leaves = tree_leaves(tree)
    return [one for one in leaves if isinstance(one, Tensor)]


def _writes(name: str) -> bool:
    """Tell whether a function writes to its first argument, which others may see as well."""
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")


def _moved(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], source: Tensor, rows: Tensor
) -> Sequence[Tensor]:
    """Return the rows of what a function has made of a tensor; nothing if it computes with the numbers."""
    name = getattr(func, "__name__", "")
    is_first = bool(args) and args[0] is source
    if name in _FACTORS:
        others = [one for one in _tensors((args, kwargs)) if one is not source]
        is_common = all(one.numel() == 1 for one in others)
        is_multiplied = is_first or "mul" in name
        return [rows] if is_common and is_multiplied else []
    if not is_first:
        return []
    if name in _COPIES:
        return [rows]
    if name not in _VIEWS:
        return []
    try:
        view = Tensor.reshape if name == "view" else func  # rows may have other strides than the tensor
        moved = view(rows, *args[1:], **kwargs)
    except (RuntimeError, TypeError):  # a view as another type, say
        return []
    return _tensors(moved)


def _spread(rows: Tensor, axis: int, like: Tensor) -> Tensor:
    """Return rows along an axis of a tensor in its shape, without memory of their own."""
    shape = [1] * like.dim()
    shape[axis] = len(rows)
    along = rows.view(shape)
    return along.expand(like.shape)


def _without_repeats(rows: Tensor) -> Tensor:
    """Return rows without the axes along which they are told to be the same."""
    for axis, stride in enumerate(rows.stride()):
        if stride == 0 and rows.shape[axis]:
            rows = rows.narrow(axis, 0, 1)
    return rows


def rows_along(rows: Tensor, axis: int) -> Tensor | None:
    """Return the rows along an axis if they are the same wherever one looks; else None.

    Args:
        rows: Of any shape.
        axis: The axis.

    Returns:
        (length of the axis,).
    """
    length = rows.shape[axis]
    if not rows.numel():
        return None
    distinct = _without_repeats(rows)
    last = distinct.movedim(axis, -1)
    by_place = last.flatten(0, -2)
    first = by_place[0]
    if not bool((by_place == first).all()):
        return None
    return first.expand(length)
