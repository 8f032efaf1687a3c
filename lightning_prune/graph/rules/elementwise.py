"""Operators that combine tensors element by element, or keep the shape of their input."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer, tensors_in

__all__ = ["combine", "same_shape"]

_FIXED_SIZE = "is combined with a tensor of fixed size"


def combine(tracer: Tracer, tensors: Iterable[Tensor], output: Tensor) -> None:
    """Tie the axes of tensors that are broadcast together, and give their labels to the output."""
    combined = _CombinedAxes(tracer, output)
    for tensor in tensors:
        combined.add(tensor)
    combined.label_output()


class _CombinedAxes:
    """Labels along the axes of an output that tensors are broadcast to.

    Args:
        tracer: The tracer.
        output: What the operator returned.
    """

    def __init__(self, tracer: Tracer, output: Tensor) -> None:
        self.tracer = tracer
        self.output = output
        self.sizes = output.shape
        self.labels: dict[int, Labels] = {}  # by axis of the output
        self.fixed: set[int] = set()  # axes of the output along which some tensor has positions without labels

    def add(self, tensor: Tensor) -> None:
        """Add a tensor that the operator was given."""
        labels_by_axis = self.tracer.all_labels(tensor)
        output_axis = len(self.sizes) - tensor.dim()  # broadcasting adds axes in front
        for axis, size in enumerate(tensor.shape):
            labels = labels_by_axis.get(axis)
            self._add_axis(output_axis, size, labels)
            output_axis += 1

    def _add_axis(self, axis: int, size: int, labels: Labels | None) -> None:
        if size != self.sizes[axis]:
            self.tracer.mark_unprunable(labels, "is repeated over a tensor of fixed size")
        elif labels is None:
            if size > 1:
                self.fixed.add(axis)
        elif axis in self.labels:
            self.tracer.tie(self.labels[axis], labels, _FIXED_SIZE)
        else:
            self.labels[axis] = labels

    def label_output(self) -> None:
        """Give the output its labels, once all tensors are added."""
        labelled = self.labels.keys()
        for axis in self.fixed & labelled:
            labels = self.labels[axis]
            self.tracer.mark_unprunable(labels, _FIXED_SIZE)
        self.tracer.set_labels(self.output, self.labels)


@rule(
    "pointwise", "aten.copy_", "aten._prelu_kernel", "aten.where", "aten.masked_fill", "aten.hardswish", "aten.glu_jvp",
    "aten.rrelu_with_noise", "aten.celu", "aten.selu", "aten.relu6", "aten.log_sigmoid_forward", "aten.dequantize",
)  # fmt: skip
def pointwise(tracer: Tracer, call: Call) -> None:
    """Tie the channels of all arguments, which are broadcast together.

    This is the rule of every operator that PyTorch tags as pointwise.
    """
    tensors = call.given
    has_weights = any(map(tracer.is_weight, tensors))
    shifts_zero = has_weights and not _keeps_zero(tracer, call)
    for output in call.outputs:
        combine(tracer, tensors, output)
        if shifts_zero:
            tracer.shift_zero(output)


def _keeps_zero(tracer: Tracer, call: Call) -> bool:
    """Tell whether the output is zero wherever masked weights are zero, so that it is masked with them."""
    labelled = [tensor for tensor in call.given if tracer.all_labels(tensor)]
    if not _is_zero_where(call, labelled):
        return False
    if tracer.of_weights:  # all of them are masked together, or noted as weights that cannot be masked alone
        return True
    return _is_zero_where(call, labelled[:1])


def _is_zero_where(call: Call, zero_tensors: Iterable[Tensor]) -> bool:
    """Run the operator on tensors of one number each: zero in place of some, one in place of all others."""
    numbers = {}
    for tensor in call.given:
        numbers[id(tensor)] = _single_number(tensor, 1)
    for tensor in zero_tensors:
        numbers[id(tensor)] = _single_number(tensor, 0)

    def stand_in(value: Any) -> Any:
        return numbers.get(id(value), value)

    args = tree_map(stand_in, call.args)
    kwargs = tree_map(stand_in, call.kwargs)
    result = call.operator(*args, **kwargs)
    return not any(bool(output.any()) for output in tensors_in(result))


def _single_number(tensor: Tensor, value: int) -> Tensor:
    shape = [1] * tensor.dim()
    return torch.full(shape, value, dtype=tensor.dtype)


@rule(
    "aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like", "aten.randn_like",
    "aten.bernoulli", "aten.bernoulli_", "aten.native_dropout", "aten.clone", "aten.detach", "aten.alias",
    "aten._to_copy", "aten.contiguous", "aten.lift_fresh", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_",
    "aten.resolve_conj", "aten.resolve_neg", "aten.dropout", "aten.feature_dropout", "aten.exponential_",
)  # fmt: skip
def same_shape(tracer: Tracer, call: Call) -> None:
    """Give the output the channels of the first argument, whose shape it has whatever that is."""
    x = call.args[0]
    labels_by_axis = tracer.all_labels(x)
    for output in call.outputs:
        tracer.set_labels(output, labels_by_axis)


@rule("aten.embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    """Look up rows of a table: they are unprunable, its columns are an out-channel slice."""
    table, index = call.args[:2]
    rows = tracer.labels(table, 0)
    columns = tracer.labels(table, 1)
    tracer.mark_unprunable(rows, "is looked up by number")
    tracer.mark_out_slice(columns)
    last_axis = index.dim()  # the output is (*shape of the index, columns)
    output_labels = {**tracer.all_labels(index), last_axis: columns}
    tracer.set_labels(call.output, output_labels)
