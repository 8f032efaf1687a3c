"""Heads of attention: the rows of weights that their queries and keys come from, and the second moments of both."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation.attention import Product, WatchAttention
from lightning_prune.surgery.compensation.lockstep import MakeNetwork
from lightning_prune.surgery.compensation.origins import Origin
from lightning_prune.surgery.compensation.survey import names_of

__all__ = ["FoundHeads", "Head", "HeadMoments", "Rows"]

_ENOUGH = 256  # queries for each channel, from which on more tell little that is new


class Rows(NamedTuple):
    """Rows of a weight that make the queries or the keys of a head.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias; empty if there is none.
        shift: How far behind those of the weight the rows of the bias lie.
        rows: The rows, in the order in which they are multiplied with others.
    """

    weight: str
    bias: str
    shift: int
    rows: tuple[int, ...]


@dataclass(eq=False)
class Head:
    """Queries, of one head or of several that share keys, and these.

    Attributes:
        keys: The rows of the keys.
        queries: Those of the queries.
        of_queries: (width, width) float64, sum of the products of channels over queries.
        of_keys: (width, width) float64, the same over keys, about their mean in each sample.
        count: Number of queries.
    """

    keys: Rows
    queries: set[Rows]
    of_queries: Tensor
    of_keys: Tensor
    count: int = 0

    @property
    def rows(self) -> list[Rows]:
        """The rows of the queries in order, and of the keys."""
        return [*sorted(self.queries), self.keys]

    @property
    def is_enough(self) -> bool:
        """Whether there are so many queries that more would tell little that is new."""
        width = len(self.of_keys)
        return self.count >= _ENOUGH * width

    def add(self, query: Tensor, key: Tensor) -> None:
        """Add samples.

        Args:
            query: (samples, queries, width).
            key: (samples, keys, width).
        """
        queries = query.double().flatten(0, 1)
        keys = key.double()
        mean = keys.mean(1, keepdim=True)
        apart = (keys - mean).flatten(0, 1)
        self.of_queries.addmm_(queries.T, queries)
        self.of_keys.addmm_(apart.T, apart)
        self.count += len(queries)


@dataclass
class FoundHeads:
    """The heads of a network, and what was seen of them.

    Attributes:
        by_keys: The heads, by the rows of their keys.
        unknown: The width of heads, by the names of the weights whose outputs are computed with before they are
            multiplied as queries or keys.
        other: The same where they are multiplied for anything but a softmax.
        used: Rows of weights that are used elsewhere too, by the names of these.
        batches: How many batches were looked at.
    """

    by_keys: dict[Rows, Head] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    used: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    batches: int = 0

    def add(self, product: Product) -> None:
        """Add the queries and keys of a product."""
        query = _by_head(product, product.query, product.of_query)
        key = _by_head(product, product.key, product.of_key)
        if query is None or key is None:
            self.unknown.update(product.widths)
            return
        both = torch.cat([query.rows, key.rows], 1)
        pairs, number_of = both.unique(dim=0, return_inverse=True)
        for number, pair in enumerate(pairs.tolist()):
            width = len(pair) // 2
            queries = query.named(pair[:width])
            head = self._head(key.named(pair[width:]), product.query)
            head.queries.add(queries)
            is_here = number_of == number
            head.add(query.numbers[is_here], key.numbers[is_here])

    def _head(self, keys: Rows, like: Tensor) -> Head:
        if keys not in self.by_keys:
            width = len(keys.rows)
            nothing = torch.zeros(width, width, dtype=torch.float64, device=like.device)
            self.by_keys[keys] = Head(keys, set(), nothing, nothing.clone())
        return self.by_keys[keys]

    def used_once(self, heads: Iterable[Head]) -> list[Head]:
        """Return those of some heads whose rows have no other use."""
        uses: Counter[tuple[str, int]] = Counter()
        for head in self.by_keys.values():
            for one in head.rows:
                of_weight = [(one.weight, row) for row in one.rows]
                uses.update(of_weight)
        for name, used in self.used.items():
            elsewhere = [(name, row) for row in used]
            uses.update(elsewhere)
        found = []
        for head in heads:
            of_head = [uses[one.weight, row] for one in head.rows for row in one.rows]
            if max(of_head) == 1:
                found.append(head)
        return found


class _ByHead(NamedTuple):
    """Queries or keys, one head of one sample after the other.

    Attributes:
        numbers: (heads, tokens, width).
        rows: (heads, width) the rows that made them.
        origin: Where they come from.
    """

    numbers: Tensor
    rows: Tensor
    origin: Origin

    def named(self, rows: list[int]) -> Rows:
        """Return rows with the names of the weight and the bias that they are of."""
        origin = self.origin
        return Rows(origin.weight, origin.bias, origin.shift, tuple(rows))


def _by_head(product: Product, numbers: Tensor, origin: Origin | None) -> _ByHead | None:
    """Return one side of a product head by head; None if the rows that made it are not known or differ by token."""
    if origin is None or origin.rows is None or not numbers.numel():
        return None
    rows = origin.rows
    of_token = rows[..., :1, :]
    if not bool((rows == of_token).all()):
        return None
    leading = torch.broadcast_shapes(product.query.shape[:-2], product.key.shape[:-2])
    heads = leading.numel()
    tokens, width = numbers.shape[-2:]
    numbers = numbers.expand(*leading, tokens, width)
    rows = of_token.expand(*leading, 1, width)
    return _ByHead(numbers.reshape(heads, tokens, width), rows.reshape(heads, width), origin)


class HeadMoments:
    """Second moments of the queries and keys of a network before the prune: the same for every plan.

    A constant that is added to all scores of a query changes nothing behind a softmax, so that keys are looked at about
    their mean. Products that no softmax is taken of are not looked at.

    Args:
        model: The network.
        make: Makes the network that is run.
        batches: What it is run on, as many of them as are needed.
        found: What others have found in the same network on the same batches, to which more is added.
    """

    def __init__(
        self, model: nn.Module, make: MakeNetwork, batches: Iterable[Any], found: FoundHeads | None = None
    ) -> None:
        self._tensors = named_tensors(model)
        self._make = make
        self._batches = batches
        self.found = FoundHeads() if found is None else found

    def heads(self, is_wanted: Callable[[Head], bool]) -> list[Head]:
        """Return the heads that are wanted, once they have been seen often enough or in all batches.

        Args:
            is_wanted: Tells whether a head is wanted.
        """
        found = self.found
        for batch in islice(self._batches, found.batches, None):
            wanted = [head for head in found.by_keys.values() if is_wanted(head)]
            if found.batches and all(head.is_enough for head in wanted):
                break
            run = self._make(self._tensors, None)
            with WatchAttention(names_of(self._tensors), found.add) as watch:
                run(batch)
            for name, rows in watch.used().items():
                found.used[name] |= rows
            for product in watch.pending:
                found.other.update(product.widths)
            found.batches += 1
        return [head for head in found.by_keys.values() if is_wanted(head)]
