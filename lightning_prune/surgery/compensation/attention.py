"""Attention: products of queries and keys that a softmax is taken of, however they are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_prune.surgery.compensation.operators import READ_CALL, Linear
from lightning_prune.surgery.compensation.origins import Origin, Origins
from lightning_prune.surgery.compensation.survey import ByTensor

__all__ = ["Product", "WatchAttention"]

_FIRST_FACTOR = {
    "__matmul__": 0,
    "baddbmm": 1,
    "bmm": 0,
    "matmul": 0,
}


@dataclass(frozen=True, eq=False)
class Product:
    """A product of queries and keys.

    Attributes:
        query: (..., queries, width).
        key: (..., keys, width).
        of_query: The origin of the queries; None if no layer has made them.
        of_key: The origin of the keys; None if no layer has made them.
    """

    query: Tensor
    key: Tensor
    of_query: Origin | None
    of_key: Origin | None

    @property
    def widths(self) -> dict[str, int]:
        """The width of heads, by the names of the weights that have made them."""
        made = filter(None, (self.of_query, self.of_key))
        return {origin.weight: self.query.shape[-1] for origin in made}

    @property
    def is_known(self) -> bool:
        """Whether it is known which rows of weights have made both."""
        if self.of_query is None or self.of_key is None:
            return False
        return self.of_query.rows is not None and self.of_key.rows is not None


class WatchAttention(TorchFunctionMode):
    """Follow the channels of layers to where they are multiplied with each other, and on to a softmax.

    Args:
        names: The name of each tensor of the model by its ``id``.
        on_product: What products of queries and keys are given to.

    Attributes:
        pending: Products that no softmax was taken of yet.
    """

    def __init__(self, names: Mapping[int, str], on_product: Callable[[Product], None]) -> None:
        super().__init__()
        self._on_product = on_product
        self._origins = Origins(names)
        self._scores: ByTensor[Product] = ByTensor()
        self.pending: list[Product] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        read = READ_CALL.get(func)
        layer = read(*args, **kwargs) if read else None
        if isinstance(layer, Linear):
            self._origins.follow_layer(layer, output)
            scores = self._scores.get(layer.given)
            if scores is not None and scores.is_known:  # heads may be mixed, as those that talk to each other are
                self._scores.set(output, scores)
        elif name == "scaled_dot_product_attention":
            self._attend(*args, **kwargs)
        elif name == "einsum":
            self._sum_over(args, output)
        elif name in _FIRST_FACTOR and len(args) > 1 + _FIRST_FACTOR[name]:
            first = _FIRST_FACTOR[name]
            query, key = args[first : first + 2]
            self._multiply(query, key, output)
        else:
            self._origins.follow(func, args, kwargs, output)
            self._follow_scores(name, args, kwargs, output)
        return output

    def used(self) -> Mapping[str, set[int]]:
        """Return the rows of weights that something else is computed with, by the names of these."""
        for product in self.pending:
            self._origins.use(product.query)
            self._origins.use(product.key)
        return self._origins.used

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *others: Any, enable_gqa: bool = False, **settings: Any
    ) -> None:
        """Take note of attention, which is a softmax of products."""
        self._origins.use(value)
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key = self._origins.viewed(key, lambda keys: keys.repeat_interleave(times, -3))
        product = self._product(query, key)
        if product is not None:
            self._on_product(product)

    def _multiply(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        """Take note of a product of matrices."""
        if key.dim() > 1:
            key = self._origins.viewed(key, lambda keys: keys.mT)
        self._await(query, key, output)

    def _sum_over(self, args: Sequence[Any], output: Tensor) -> None:
        """Take note of a sum in Einstein's notation."""
        equation, *factors = tree_leaves(args)
        orders = _orders(equation) if isinstance(equation, str) else []
        if len(orders) != len(factors):
            for factor in (equation, *factors):
                self._origins.use(factor)
            return
        spaceless = equation.replace(" ", "")
        ordered = []
        for number, axes in enumerate(spaceless.partition("->")[0].split(",")):
            view = partial(_ordered, axes=axes, order=orders[number])
            ordered.append(self._origins.viewed(factors[number], view))
        query, key = ordered
        self._await(query, key, output)

    def _await(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        """Take a product for scores until a softmax is taken of it."""
        product = self._product(query, key)
        if product is None:
            return
        if product.is_known:
            self.pending.append(product)
        self._scores.set(output, product)

    def _product(self, query: Tensor, key: Tensor) -> Product | None:
        """Return a product, if layers have made one of both or both."""
        origins = []
        for factor in (query, key):
            origin = self._origins.of(factor)
            is_made = origin is not None and origin.is_made
            origins.append(origin if is_made else None)
        product = Product(query, key, *origins)
        if not product.is_known:
            self._origins.use(query)
            self._origins.use(key)
        return product if any(origins) else None

    def _follow_scores(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Let what is made of scores count as these, up to a softmax."""
        if not isinstance(output, Tensor):
            return
        for one in tree_leaves((args, kwargs)):
            product = self._scores.get(one)
            if product is None:
                continue
            if name != "softmax":
                self._scores.set(output, product)
            elif not product.is_known:
                self._on_product(product)
            elif product in self.pending and _is_last(one, args, kwargs):
                self.pending.remove(product)
                self._on_product(product)


def _is_last(scores: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a softmax is taken along the last axis, which is that of the keys."""
    axis = kwargs.get("dim")
    if axis is None and len(args) > 1:
        axis = args[1]
    return axis in (-1, scores.dim() - 1)


def _orders(equation: str) -> list[list[str]]:
    """Return the axes of two factors in the order of queries and keys; nothing if there are no such.

    Scores have the axes of queries and of keys last; what is before them need not be an axis of both factors.
    """
    spaceless = equation.replace(" ", "")
    given, _, output = spaceless.partition("->")
    query, _, key = given.partition(",")
    summed = [axis for axis in query if axis in key and axis not in output]
    if len(summed) != 1 or len(output) < 2 or "." in equation:
        return []
    orders = []
    for axes, token in ((query, output[-2]), (key, output[-1])):
        order = [*output[:-2], token, *summed]
        if token not in axes or not set(axes) <= set(order):
            return []
        orders.append(order)
    return orders


def _ordered(factor: Tensor, axes: str, order: Sequence[str]) -> Tensor:
    """Bring the axes of a factor into an order, in which those that it has not are of length one."""
    own = [axes.index(axis) for axis in order if axis in axes]
    ordered = factor.permute(own)
    for place, axis in enumerate(order):
        if axis not in axes:
            ordered = ordered.unsqueeze(place)
    return ordered
