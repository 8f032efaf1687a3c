"""Records of a forward pass: what the tracer writes down while it runs, for others to read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from torch import Tensor

from lightning_prune.graph.frames import SourceLine

__all__ = [
    "FIXED", "Call", "CallKey", "CostTerm", "Known", "Labels", "LeastRequired", "ModuleCall", "Note", "OperatorStep",
    "OutputLabels", "Record", "Shaping", "Sheet", "Split", "SplitSite", "Tie", "numbers_in", "tensors_in",
]  # fmt: skip

_SEQUENCES = (tuple, list)  # to be looked among takes a fraction of what a union of types takes
Labels = Tensor  # (size of the axis,) int64: the label of each position
FIXED = 0  # the label of a position that no parameter can prune, such as a zero that `F.pad` put there

OperatorStep = tuple[Any, ...]  # the rule that an operator followed, and the numbers that it computed with
OutputLabels = dict[int, Labels]  # the labels of an output, by axis


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among the arguments or outputs of an operator, which nests nothing deeper than lists."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, _SEQUENCES):
        for item in value:
            if isinstance(item, Tensor):  # most are not in a list of their own
                found.append(item)
            elif isinstance(item, _SEQUENCES):
                found += tensors_in(item)
    return found


def numbers_in(values: Iterable[Any]) -> list[float]:
    """Return the numbers among some values."""
    return [value for value in values if isinstance(value, int | float)]


class Call(NamedTuple):
    """One operator as it was called, or one module that has a rule of its own.

    Attributes:
        operator: The ATen operator, overload and all, or the module.
        args: Its positional arguments.
        kwargs: Its named arguments.
        output: What it returned.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument, whether it was given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def name(self) -> str:
        """Name of the operator without its overload, ``aten.convolution``, or of the module's class."""
        class_name = type(self.operator).__qualname__
        return str(getattr(self.operator, "overloadpacket", class_name))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors among what it returned."""
        return tensors_in(self.output)

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors_in([*self.args, *self.kwargs.values()])


class Tie(NamedTuple):
    """Positions of two axes that can only be pruned together.

    Attributes:
        first: Labels along one axis.
        second: Labels along the other, of equal number.
        module: Name of the module that ran.
        why: What to say when one side cannot be pruned.
        of_weights: Whether nothing but weights met there, to be computed into another weight.
    """

    first: Labels
    second: Labels
    module: str
    why: str
    of_weights: bool = False

    @property
    def sides(self) -> list[Labels]:
        """The labels of both sides, each in one row."""
        return [self.first.reshape(-1), self.second.reshape(-1)]


class Note(NamedTuple):
    """Something that a rule said about channels.

    Attributes:
        labels: The channels.
        module: Name of the module that ran.
        why: What it does to them.
    """

    labels: Labels
    module: str
    why: str

    def __str__(self) -> str:
        return f"{self.module}: {self.why}"


class CostTerm(NamedTuple):
    """A number of operations: a coefficient times the product of the lengths of some axes.

    Attributes:
        coefficient: What does not depend on any channel.
        axes: The labels along each axis that can become shorter, the size of each other one.
        module: Name of the module that spends it.
    """

    coefficient: int
    axes: tuple[Labels | int, ...]
    module: str


class LeastRequired(NamedTuple):
    """The channels along an axis, and how few there may be: a squeeze drops an axis of one, which has no variance."""

    labels: Labels
    channels: int


class CallKey(NamedTuple):
    """A module, and how often it had been called before."""

    module: str
    number: int


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        start: Length of the operator trace before it.
        stop: Length of the operator trace after it.
        inputs: The positional and the named arguments.
        output: What it returned.
    """

    start: int
    stop: int
    inputs: Any
    output: Any


class SplitSite(NamedTuple):
    """A line of code that splits an axis into several, and how many."""

    line: SourceLine
    axes: int


class Split(NamedTuple):
    """An axis that was split into several.

    Attributes:
        site: Where.
        labels: The labels of all its positions.
        followed: Which of the axes it was split into has labels.
    """

    site: SplitSite
    labels: Labels
    followed: int


class Sheet(Enum):
    """Which channels labels follow where an axis is split into heads and their widths, or merged of them."""

    EITHER = auto()
    WIDTHS = auto()
    HEADS = auto()


class Shaping(NamedTuple):
    """A place where code gives a function sizes of channels, or attention the width that it is scaled by.

    Attributes:
        module: Name of the module that runs.
        function: What the function does; see `lightning_prune.pruning_plan.Site`.
        shape: The shape of the tensor that it is given.
        given: The labels of that tensor, by axis.
        sizes: The sizes as the code has them.
        labels: The labels along the axis that each size is of, None where it has none.
        power: Which power of its size a factor is.
    """

    module: str
    function: str
    shape: tuple[int, ...]
    given: OutputLabels
    sizes: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    power: float = 1.0


@dataclass
class Record:
    """What a forward pass showed.

    Attributes:
        ties: Labels that can only be pruned together.
        same_widths: Labels that are to be equally many, in whatever order.
        unprunable: Channels that cannot be pruned.
        not_mask_exact: Channels whose pruning is not the same as masking.
        out_slices: Axes of weights that produce channels.
        in_slices: Axes of weights that consume channels.
        least_required: Axes that must not have fewer channels than some number.
        costs: Operations.
        operator_trace: What each operator did; two passes of equal operator traces do the same thing.
        output_labels: The labels that each of these operators gave to its first output.
        given_labels: The labels that each was given, of a pass on real data.
        cut: The labels along each axis that an operator passed only some of on.
        module_calls: The calls of all modules, in the order in which they ended.
        used: Names of the parameters and buffers that an operator was given.
        kinds: Which kind of channels some are.
        summed: Channels that are products are summed over, which are zero where all their weights are.
        normed: Channels that a norm is taken over, which is the same as masking where products are summed over them.
        splits: The axes that were split into several.
        shapings: The places where code writes sizes of channels.
        computed_with: Attributes that counts of channels are divided by: name of the module, and of the attribute.
    """

    ties: list[Tie] = field(default_factory=list)
    same_widths: list[Tie] = field(default_factory=list)
    unprunable: list[Note] = field(default_factory=list)
    not_mask_exact: list[Note] = field(default_factory=list)
    out_slices: list[Labels] = field(default_factory=list)
    in_slices: list[Labels] = field(default_factory=list)
    least_required: list[LeastRequired] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)
    operator_trace: list[OperatorStep] = field(default_factory=list)
    output_labels: list[OutputLabels] = field(default_factory=list)
    given_labels: list[list[Labels]] = field(default_factory=list)
    cut: list[Labels] = field(default_factory=list)
    module_calls: dict[CallKey, ModuleCall] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    kinds: list[Note] = field(default_factory=list)
    summed: list[Labels] = field(default_factory=list)
    normed: list[Note] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    shapings: list[Shaping] = field(default_factory=list)
    computed_with: set[tuple[str, str]] = field(default_factory=set)

    def extend(self, other: "Record") -> None:
        """Add what another pass showed about channels."""
        self.ties.extend(other.ties)
        self.same_widths.extend(other.same_widths)
        self.unprunable.extend(other.unprunable)
        self.not_mask_exact.extend(other.not_mask_exact)
        self.out_slices.extend(other.out_slices)
        self.in_slices.extend(other.in_slices)
        self.least_required.extend(other.least_required)
        self.kinds.extend(other.kinds)
        self.summed.extend(other.summed)
        self.normed.extend(other.normed)
        self.used |= other.used


@dataclass(frozen=True)
class Known:
    """What earlier passes have shown about a network, which a smaller one no longer shows.

    Attributes:
        shrinking_axis: Which of the axes that one was split into becomes shorter; the last where nothing is known.
        grouped: Names of the weights of grouped convolutions and normalisations, or where they are read if they are
            computed; one of a single group looks like any other.
        sheet: Which channels labels follow.
    """

    shrinking_axis: dict[SplitSite, int] = field(default_factory=dict)
    grouped: frozenset[str] = frozenset()
    sheet: Sheet = Sheet.EITHER
