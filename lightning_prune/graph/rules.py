"""What each operator says about channels: one table, from an operator's name to its rule.

A rule is a function of the tracer and the call. It gives the output its labels (`Tracer.set_labels`) and says which
channels leave together (`tie`), which stay whole and why (`hold`), which side of a weight makes channels (`produce`)
and which reads them (`read`). Operators tagged as pointwise by PyTorch share one rule. Whatever has no rule keeps the
channels it touches whole: nothing is guessed.

Example:
    A rule for an operator of your own, under the name that ``torch.library`` knows it by::

        from lightning_prune.graph import rule

        @rule("mylib.swish_scale")
        def swish_scale(tracer, call):
            x = call.argument(0, "x")
            tracer.set_labels(call.output, tracer.all_labels(x))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.tracer import FIXED, Call, Labels, Tracer

__all__ = ["RULES", "rule"]

Rule = Callable[[Tracer, Call], None]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by name.

    Args:
        operators: Names such as ``"aten.convolution"``; an operator that has a rule already gets the new one.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Example:
        >>> @rule("mylib.identity")
        ... def identity(tracer, call):
        ...     tracer.set_labels(call.output, tracer.all_labels(call.args[0]))
        >>> RULES.pop("mylib.identity") is identity
        True
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


# -- operators that mix channels ---------------------------------------------------------------------------------------


@rule("aten.convolution", "aten._convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Tie the input's channels to the weight's input side; the output has the labels of the output side."""
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    transposed, groups = call.argument(6, "transposed", False), call.argument(8, "groups", 1)
    channel = x.dim() - weight.dim() + 1  # an input without a batch axis has its channels first
    for axis in range(2, weight.dim()):
        tracer.hold(tracer.labels(weight, axis), "is the kernel size of a convolution")
    for axis, labels in tracer.all_labels(x).items():
        if axis > channel:
            tracer.hold(labels, "is a spatial axis of a convolution")
    inlet, outlet = (0, 1) if transposed else (1, 0)
    if groups == 1:
        tracer.tie(tracer.labels(x, channel), tracer.labels(weight, inlet), "reads an input of fixed size")
        tracer.read(tracer.labels(weight, inlet))
        made = tracer.labels(weight, outlet)
    else:
        made = _grouped(tracer, tracer.labels(x, channel), weight, x.shape[channel], groups, transposed)
    tracer.produce(made)
    if bias is not None:
        tracer.tie(made, tracer.labels(bias, 0), "has a bias of fixed size")
    batch = {0: tracer.labels(x, 0)} if channel > 0 else {}
    tracer.set_labels(call.output, {**batch, channel: made})


def _grouped(
    tracer: Tracer, read: Labels | None, weight: Tensor, channels: int, groups: int, transposed: bool
) -> Labels | None:
    """Let whole convolution groups leave: a group's inputs, outputs and kernels are one channel of the plan.

    A depthwise convolution is the case of one input a group, with or without a multiplier.
    """
    full, shared = tracer.labels(weight, 0), tracer.labels(weight, 1)
    tracer.hold(shared, "is the inner side of a grouped convolution")
    if full is None:
        tracer.hold(read, "is read by a grouped convolution of fixed size")
        return None
    first = full.view(groups, -1)[:, :1]  # one label stands for its convolution group
    tracer.tie(full, first.expand(groups, full.numel() // groups).reshape(-1), "is a grouped convolution")
    tied = first.expand(groups, channels // groups).reshape(-1)
    tracer.tie(read, tied, "is a grouped convolution that reads an input of fixed size")
    if not transposed:
        return full
    return first.expand(groups, weight.shape[1]).reshape(-1)


def _contract(tracer: Tracer, left: Tensor, left_axis: int, right: Tensor, right_axis: int) -> None:
    """Tie the axis that a matrix product sums over, and note which weight reads and which makes channels."""
    tracer.tie(tracer.labels(left, left_axis), tracer.labels(right, right_axis), "multiplies a matrix of fixed size")
    for operand, inner in ((left, left_axis), (right, right_axis)):
        if getattr(operand, "_is_weight", False):
            tracer.read(tracer.labels(operand, inner))
            outer = operand.dim() - 1 if inner % operand.dim() == operand.dim() - 2 else operand.dim() - 2
            tracer.produce(tracer.labels(operand, outer))


@rule("aten.mm", "aten.bmm")
def matrix_product(tracer: Tracer, call: Call) -> None:
    """Sum over the last axis of the first matrix and the one before last of the second."""
    left, right = call.args[0], call.args[1]
    _contract(tracer, left, -1, right, -2)
    last = call.output.dim() - 1
    axes = {last - 1: tracer.labels(left, -2), last: tracer.labels(right, -1)}
    if last == 2:
        tracer.tie(tracer.labels(left, 0), tracer.labels(right, 0), "is a batch of matrices of fixed number")
        axes[0] = tracer.labels(left, 0)
    tracer.set_labels(call.output, axes)


@rule("aten.addmm", "aten.baddbmm")
def biased_matrix_product(tracer: Tracer, call: Call) -> None:
    """Add a bias, broadcast, to a matrix product."""
    bias, left, right = call.args[0], call.args[1], call.args[2]
    matrix_product(tracer, Call(call.operator, (left, right), {}, call.output))
    product = dict(tracer.all_labels(call.output))
    _combine(tracer, [(bias, tracer.all_labels(bias)), (call.output, product)], call.output)


@rule("aten.mv")
def matrix_vector_product(tracer: Tracer, call: Call) -> None:
    """Sum over the vector."""
    matrix, vector = call.args
    tracer.tie(tracer.labels(matrix, 1), tracer.labels(vector, 0), "multiplies a vector of fixed size")
    tracer.set_labels(call.output, {0: tracer.labels(matrix, 0)})


# -- operators that combine tensors element by element -----------------------------------------------------------------


def _combine(tracer: Tracer, parts: list[tuple[Tensor, dict[int, Labels]]], output: Tensor) -> None:
    """Tie the labels of tensors that are broadcast together and give them to the output."""
    result: dict[int, Labels] = {}
    for axis, size in enumerate(output.shape):
        behind = output.dim() - axis
        fixed = False
        for tensor, labels in parts:
            own = tensor.dim() - behind
            if own < 0 or tensor.shape[own] != size:
                continue  # broadcast along this axis
            along = labels.get(own)
            if along is None:
                fixed = fixed or size > 1
            elif axis in result:
                tracer.tie(result[axis], along, "combines channels with positions of fixed number")
            else:
                result[axis] = along
        if fixed and axis in result:
            tracer.hold(result[axis], "is combined with a tensor of fixed size")
    tracer.set_labels(output, dict(result))


@rule("pointwise", "aten.copy_", "aten._prelu_kernel")
def pointwise(tracer: Tracer, call: Call) -> None:
    """Tie the arguments, broadcast together; the rule of every operator that PyTorch tags as pointwise."""
    tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    for output in outputs:
        if isinstance(output, Tensor):
            _combine(tracer, [(t, dict(tracer.all_labels(t))) for t in tensors], output)


@rule(
    "aten.empty_like", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.rand_like", "aten.randn_like",
    "aten.bernoulli", "aten.bernoulli_", "aten.native_dropout", "aten.clone", "aten.detach", "aten.alias",
    "aten._to_copy", "aten.contiguous", "aten.lift_fresh", "aten.fill_", "aten.zero_", "aten.normal_", "aten.uniform_",
    "aten.resolve_conj", "aten.resolve_neg", "aten.dropout", "aten.feature_dropout",
)  # fmt: skip
def same_shape(tracer: Tracer, call: Call) -> None:
    """Keep the labels: the output is made in the shape of the first argument, whatever that is when it runs."""
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    for output in outputs:
        if isinstance(output, Tensor):
            tracer.set_labels(output, dict(tracer.all_labels(call.args[0])))


# -- normalisation -----------------------------------------------------------------------------------------------------


@rule(
    "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training",
    "aten._native_batch_norm_legit_functional", "aten._batch_norm_with_update", "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm", "aten._batch_norm_no_update", "aten.batch_norm",
)  # fmt: skip
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Tie the channels to whatever is stored per channel."""
    x = call.args[0]
    for stored in call.args[1:5]:
        if isinstance(stored, Tensor):
            tracer.tie(tracer.labels(x, 1), tracer.labels(stored, 0), "is normalised by statistics of fixed number")
    output = call.output[0] if isinstance(call.output, tuple | list) else call.output
    tracer.set_labels(output, dict(tracer.all_labels(x)))


# -- spatial operators -------------------------------------------------------------------------------------------------


def _spatial(axes: int) -> Rule:
    def spatial(tracer: Tracer, call: Call) -> None:
        """Keep the labels of all but the last axes, which are pooled or resized."""
        x = call.args[0]
        outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
        for axis, labels in tracer.all_labels(x).items():
            if axis >= x.dim() - axes:
                tracer.hold(labels, "is a spatial axis that is pooled or resized")
        for output in outputs:
            kept = {axis: labels for axis, labels in tracer.all_labels(x).items() if axis < x.dim() - axes}
            tracer.set_labels(output, dict(kept))

    return spatial


for _axes, _operators in {
    1: ("avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d"),
    2: (
        "avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
        "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "reflection_pad2d",
        "replication_pad2d", "adaptive_avg_pool2d",
    ),
    3: ("avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d"),
}.items():  # fmt: skip
    rule(*(f"aten.{name}" for name in _operators))(_spatial(_axes))


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduced_axes(x: Tensor, axes: Any) -> set[int]:
    if axes is None or axes == []:
        return set(range(x.dim()))
    return {axis % x.dim() for axis in ([axes] if isinstance(axes, int) else axes)}


@rule(
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.max", "aten.min", "aten.prod",
    "aten.linalg_vector_norm", "aten.norm", "aten.any", "aten.all", "aten.argmax", "aten.argmin", "aten.logsumexp",
    "aten.var_mean",
)  # fmt: skip
def reduction(tracer: Tracer, call: Call) -> None:
    """Drop the reduced axes; channels that are reduced over stay whole."""
    x = call.args[0]
    where = 2 if str(call.operator.overloadpacket) in ("aten.linalg_vector_norm", "aten.norm") else 1
    reduced = _reduced_axes(x, call.argument(where, "dim"))
    for axis in reduced:
        tracer.hold(tracer.labels(x, axis), "is reduced over")
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    for output in outputs:
        keeps = output.dim() == x.dim()
        kept = {
            axis - (0 if keeps else sum(other < axis for other in reduced)): labels
            for axis, labels in tracer.all_labels(x).items()
            if axis not in reduced
        }
        tracer.set_labels(output, dict(kept))


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.cumsum")
def along_one_axis(tracer: Tracer, call: Call) -> None:
    """Keep the labels; channels along the axis that is normalised or summed up stay whole."""
    x, axis = call.args[0], call.argument(1, "dim")
    tracer.hold(tracer.labels(x, axis), "is normalised along its channels")
    tracer.set_labels(call.output, dict(tracer.all_labels(x)))


# -- operators that move data ------------------------------------------------------------------------------------------


def _spread(labels: Labels, axis: int, shape: torch.Size) -> Tensor:
    """Expand labels along one axis to the shape of their tensor, without memory."""
    return labels.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _place(tracer: Tracer, output: Tensor, moved: Tensor) -> None:
    """Give an output the labels that an operator has moved, if they vary along one axis only."""
    varying = [
        axis
        for axis, stride in enumerate(moved.stride())
        if stride != 0 and moved.shape[axis] > 1 and not bool((moved == moved.narrow(axis, 0, 1)).all())
    ]
    if len(varying) > 1:
        tracer.hold(moved.reshape(-1), "spreads its channels over several axes")
        return
    if varying:
        along = moved[tuple(slice(None) if axis == varying[0] else 0 for axis in range(moved.dim()))]
        known = dict(tracer.all_labels(output))
        if varying[0] in known:
            tracer.hold(known.pop(varying[0]), "holds two kinds of channels along one axis")
            tracer.hold(along, "holds two kinds of channels along one axis")
        else:
            known[varying[0]] = along.contiguous()
        tracer.set_labels(output, dict(known))
    elif moved.numel() > 0:
        tracer.hold(moved.reshape(-1)[:1], "has one of its channels picked out")


def _move(tracer: Tracer, call: Call, move: Callable[..., Any]) -> None:
    x, rest = call.args[0], call.args[1:]
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    for axis, labels in tracer.all_labels(x).items():
        moved = move(_spread(labels, axis, x.shape), *rest, **call.kwargs)
        for output, part in zip(outputs, moved if isinstance(moved, tuple | list) else [moved], strict=True):
            _place(tracer, output, part)


@rule(
    "aten.permute", "aten.transpose", "aten.t", "aten.squeeze", "aten.unsqueeze", "aten.expand", "aten.flip",
    "aten.repeat", "aten.numpy_T", "aten.movedim",
)  # fmt: skip
def move(tracer: Tracer, call: Call) -> None:
    """Move the labels by calling the operator on them."""
    _move(tracer, call, call.operator)


@rule("aten.view", "aten._unsafe_view", "aten.reshape")
def reshape(tracer: Tracer, call: Call) -> None:
    """Reshape the labels; axes that keep their place are passed on without touching memory."""
    x, output = call.args[0], call.output
    rest = {}
    for axis, labels in tracer.all_labels(x).items():
        before, position = x.shape[:axis].numel(), 0
        while position < output.dim() and output.shape[:position].numel() < before:
            position += 1
        while position < output.dim() and output.shape[position] == 1:
            position += 1
        if (
            position < output.dim()
            and output.shape[position] == x.shape[axis]
            and output.shape[:position].numel() == before
        ):
            tracer.set_labels(output, {**tracer.all_labels(output), position: labels})
        else:
            rest[axis] = labels
    for axis, labels in rest.items():
        _place(tracer, output, _spread(labels, axis, x.shape).reshape(output.shape))


@rule(
    "aten.slice", "aten.select", "aten.split", "aten.split_with_sizes", "aten.unbind", "aten.narrow", "aten.roll",
    "aten.index_select", "aten.unfold",
)  # fmt: skip
def part(tracer: Tracer, call: Call) -> None:
    """Take parts along an axis; channels that are themselves split or picked stay whole."""
    x = call.args[0]
    name = str(call.operator.overloadpacket)
    default = 0 if name in ("aten.slice", "aten.unbind", "aten.split", "aten.split_with_sizes") else None
    first = name in ("aten.slice", "aten.select", "aten.unbind", "aten.index_select", "aten.unfold", "aten.narrow")
    axis = call.argument(1 if first else 2, "dim", default)
    axes = {a % x.dim() for a in (axis if isinstance(axis, list | tuple) else [axis])}
    outputs = call.output if isinstance(call.output, tuple | list) else [call.output]
    if all(output.shape == x.shape for output in outputs) and name == "aten.slice":
        return same_shape(tracer, call)
    touched = {a: labels for a, labels in tracer.all_labels(x).items() if a in axes}
    for labels in touched.values():
        tracer.hold(labels, f"has its channels taken apart by {name.removeprefix('aten.')}")
    return _move(tracer, call, call.operator)


@rule("aten.cat")
def concatenate(tracer: Tracer, call: Call) -> None:
    """Put the labels side by side."""
    tensors = [t for t in call.args[0] if t.dim() == call.output.dim()]
    axis = call.argument(1, "dim", 0) % call.output.dim()
    result: dict[int, Labels | None] = {}
    if any(axis in tracer.all_labels(t) for t in tensors):
        parts = [tracer.labels(t, axis) for t in tensors]
        result[axis] = torch.cat(
            [
                labels if labels is not None else torch.full((t.shape[axis],), FIXED)
                for t, labels in zip(tensors, parts, strict=True)
            ]
        )
    for other in range(call.output.dim()):
        if other != axis and any(other in tracer.all_labels(t) for t in tensors):
            along = [tracer.labels(t, other) for t in tensors]
            result[other] = next(labels for labels in along if labels is not None)
            for labels in along:
                tracer.tie(result[other], labels, "is put beside a tensor of fixed size")
    tracer.set_labels(call.output, result)


@rule("aten.constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> None:
    """Pad the labels; what is added along the channels is of fixed number."""
    x, amounts = call.args[0], list(call.args[1])
    result: dict[int, Labels | None] = {}
    for axis, labels in tracer.all_labels(x).items():
        behind = x.dim() - 1 - axis
        around = amounts[2 * behind : 2 * behind + 2]
        result[axis] = torch.constant_pad_nd(labels, around, FIXED) if around else labels
    tracer.set_labels(call.output, result)


# -- everything else ---------------------------------------------------------------------------------------------------


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> None:
    """Keep every channel that an operator without a rule touches."""
    name = str(call.operator.overloadpacket)
    flat = torch.utils._pytree.tree_leaves((call.args, call.kwargs))
    for tensor in flat:
        for labels in tracer.all_labels(tensor).values():
            tracer.hold(labels, f"runs {name}, which has no rule")
