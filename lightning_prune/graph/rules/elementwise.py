"""Operators that combine tensors element by element, or keep the shape of their input."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer, tensors_in

__all__ = ["combine"]


def combine(tracer: Tracer, tensors: Iterable[Tensor], output: Tensor) -> None:
    """Tie the labels of tensors that are broadcast together and give them to the output."""
    result: dict[int, Labels] = {}
    fixed: set[int] = set()
    parts = [(tensor, tracer.all_labels(tensor), output.dim() - tensor.dim()) for tensor in tensors]
    for tensor, labels, offset in parts:
        for own, size in enumerate(tensor.shape):
            _along(tracer, result, fixed, labels.get(own), (own + offset, size, output.shape[own + offset]))
    for axis in fixed & result.keys():
        tracer.mark_unprunable(result[axis], "is combined with a tensor of fixed size")
    tracer.set_labels(output, result)


def _along(
    tracer: Tracer, result: dict[int, Labels], fixed: set[int], labels: Labels | None, sizes: tuple[int, int, int]
) -> None:
    """Add one axis of one tensor to what is known of the output; ``sizes``: output axis, own size, output size."""
    axis, own, whole = sizes
    if own != whole:
        tracer.mark_unprunable(labels, "is repeated over a tensor of fixed size")
    elif labels is None:
        if own > 1:
            fixed.add(axis)
    elif axis in result:
        tracer.tie(result[axis], labels, "is combined with a tensor of fixed size")
    else:
        result[axis] = labels


@rule(
    "pointwise", "aten.copy_", "aten._prelu_kernel", "aten.where", "aten.masked_fill", "aten.hardswish", "aten.glu_jvp",
    "aten.rrelu_with_noise", "aten.celu", "aten.selu", "aten.relu6", "aten.log_sigmoid_forward", "aten.dequantize",
)  # fmt: skip
def pointwise(tracer: Tracer, call: Call) -> None:
    """Tie the arguments, broadcast together; the rule of every operator that PyTorch tags as pointwise."""
    tensors = tensors_in([*call.args, *call.kwargs.values()])
    shifts = any(map(tracer.is_weight, tensors)) and not _keeps_zero(tracer, call)
    for output in call.outputs:
        combine(tracer, tensors, output)
        if shifts:
            tracer.shift_zero(output)


def _keeps_zero(tracer: Tracer, call: Call) -> bool:
    """Try on single numbers whether the output is zero where all tensors with labels are, or just the first of them.

    Weights alone are all zero, or noted as weights that cannot be masked alone.
    """
    labelled = [id(tensor) for tensor in call.given if tracer.all_labels(tensor)]
    for zeros in [labelled] if tracer.of_weights else [labelled, labelled[:1]]:
        numbers = {id(t): torch.full([1] * t.dim(), id(t) not in zeros, dtype=t.dtype) for t in call.given}
        args, kwargs = tree_map(lambda leaf: numbers.get(id(leaf), leaf), (call.args, call.kwargs))  # noqa: B023
        if any(bool(output.any()) for output in tensors_in(call.operator(*args, **kwargs))):
            return False
    return True


@rule(
    "aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like", "aten.randn_like",
    "aten.bernoulli", "aten.bernoulli_", "aten.native_dropout", "aten.clone", "aten.detach", "aten.alias",
    "aten._to_copy", "aten.contiguous", "aten.lift_fresh", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_",
    "aten.resolve_conj", "aten.resolve_neg", "aten.dropout", "aten.feature_dropout", "aten.exponential_",
)  # fmt: skip
def same_shape(tracer: Tracer, call: Call) -> None:
    """Keep the labels: the output is made in the shape of the first argument, whatever that is when it runs."""
    for output in call.outputs:
        tracer.set_labels(output, tracer.all_labels(call.args[0]))


@rule("aten.embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    """Take rows of a table: its columns are channels."""
    table, index = call.args[0], call.args[1]
    tracer.mark_unprunable(tracer.labels(table, 0), "is looked up by number")
    result: Mapping[int, Labels | None] = {index.dim(): tracer.labels(table, 1)}
    tracer.mark_out_slice(tracer.labels(table, 1))
    tracer.set_labels(call.output, {**tracer.all_labels(index), **result})
