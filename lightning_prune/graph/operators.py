"""Operators, and all that the tracer can know about one before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_prune.graph.records import Call, tensors_in
from lightning_prune.graph.sameness import SAMENESS, Sameness
from lightning_prune.graph.shapes import SHAPES

__all__ = ["Operator", "OperatorTables", "TracerRule"]

TracerRule = Callable[[Any, Call], None]  # is given the tracer and the call

_NEEDS_VALUES = frozenset({"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal"})
_TAKES_NUMBERS = frozenset({
    "aten.lift_fresh", "aten.scalar_tensor", "aten.full", "aten.full_like", "aten.new_full", "aten.fill", "aten.fill_",
    "aten.uniform_", "aten.normal_", "aten.exponential_",
})  # fmt: skip
_REDUCES = frozenset({
    "aten.sum", "aten.mean", "aten.prod", "aten.var", "aten.std", "aten.amax", "aten.amin", "aten.max", "aten.min",
    "aten.logsumexp", "aten.linalg_vector_norm", "aten.norm", "aten.count_nonzero", "aten.cumsum", "aten.nansum",
})  # fmt: skip


_MOVES = frozenset({
    "aten.view", "aten.permute", "aten.expand", "aten.select", "aten.slice", "aten.split", "aten.clone", "aten.cat",
    "aten.stack", "aten.constant_pad_nd", "aten.index_select", "aten.index", "aten.roll", "aten.pixel_shuffle",
})  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """What is known about an operator.

    Attributes:
        function: The ATen operator, overload and all.
        rule: What it says about channels.
        cost: What it costs; None if it is free.
        shape: Finds the shape of its output faster than PyTorch does; None if nothing does.
        takes_numbers: Whether the numbers that it is given change what it computes.
        reduces: Whether it computes one number of several.
        needs_values: Whether it looks at the values of tensors.
        sameness: Tells along which axes all positions of its output are the same; None where a rule does.
        written: Number of the argument that it changes in place; None if it changes none.
    """

    function: Any
    rule: TracerRule
    cost: TracerRule | None
    shape: Callable[..., Any] | None
    takes_numbers: bool
    reduces: bool
    needs_values: bool
    sameness: Sameness | None
    written: int | None

    @property
    def tells_sameness(self) -> bool:
        """Whether it is known along which axes all positions of its output are the same."""
        return self.sameness is not None or self.takes_numbers

    def written_among(self, call: Call) -> list[Tensor]:
        """Return the tensors among its arguments that it has changed in place."""
        if self.written is None or self.written >= len(call.args):
            return []
        return tensors_in(call.args[self.written])

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Return the output.

        Args:
            args: The positional arguments.
            kwargs: The named arguments.
            tensors: The tensors among both.
        """
        if self.shape is not None:
            output = self.shape(*args, **kwargs)
            if output is not NotImplemented:
                return output
        try:
            return self.function(*args, **kwargs)
        except RuntimeError:
            if not self._mixes_devices(tensors):
                raise
            # Constants that were made on some device meet tensors without data: they need no data either.
            args, kwargs = tree_map_only(Tensor, _without_data, (args, kwargs))
            return self.function(*args, **kwargs)

    def _mixes_devices(self, tensors: list[Tensor]) -> bool:
        """Tell whether tensors with and without data meet, and no data would be written to."""
        writes_data = self.function._schema.is_mutable and not tensors[0].is_meta
        return not writes_data and len({tensor.is_meta for tensor in tensors}) == 2


def _written_argument(function: Any) -> int | None:
    for number, argument in enumerate(function._schema.arguments):
        if argument.is_write:
            return number
    return None


def _without_data(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


class OperatorTables:
    """The tables in which operators are looked up by name (`aten.convolution`).

    Args:
        rules: What an operator, or a module by the name of its class, says about channels.
        costs: What an operator costs.
    """

    def __init__(self, rules: Mapping[str, TracerRule], costs: Mapping[str, TracerRule]) -> None:
        self.rules = rules
        self.costs = costs
        self.moving = frozenset(rules[name] for name in _MOVES if name in rules)  # values, and changes none
        self._operators: dict[Any, Operator] = {}

    def look_up(self, function: Any) -> Operator:
        """Return what is known about an ATen operator."""
        operator = self._operators.get(function)
        if operator is None:
            operator = self._make_operator(function)
            self._operators[function] = operator
        return operator

    def _make_operator(self, function: Any) -> Operator:
        name = str(function.overloadpacket)
        rule = self._rule_of(name)
        return Operator(
            function=function,
            rule=rule,
            cost=self.costs.get(name),
            shape=SHAPES.get(name),
            takes_numbers=rule is self.rules["pointwise"] or name in _TAKES_NUMBERS,
            reduces=name in _REDUCES,
            needs_values=name in _NEEDS_VALUES,
            sameness=SAMENESS.get(name),
            written=_written_argument(function),
        )

    def _rule_of(self, name: str) -> TracerRule:
        """Return the rule of an operator; what works in place does element by element what its twin does."""
        pointwise = self.rules["pointwise"]
        twin = name.removesuffix("_")
        if name not in self.rules and self.rules.get(twin) is pointwise:
            return pointwise
        return self.rules.get(name, self.rules["unknown"])
