"""Operators that normalise by statistics, and those that run along one axis as softmax does."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_prune.graph.rules.elementwise import combine, same_shape
from lightning_prune.graph.rules.table import plain_name, rule
from lightning_prune.graph.tracer import Call, Tracer

__all__: list[str] = []

_FEWER = "is normalised over its channels, fewer of which have other statistics"


@rule(
    "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training",
    "aten._native_batch_norm_legit_functional", "aten._batch_norm_with_update", "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm", "aten._batch_norm_no_update", "aten.batch_norm",
)  # fmt: skip
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Tie the channels to the affine parameters and the running statistics; not mask-exact along all other axes.

    Statistics are taken over these axes: of each input or, where they are running statistics, in training.
    """
    x, *per_channel = call.args[:5]  # weight, bias, running mean, running variance
    _tie_per_channel(tracer, x, per_channel, "is normalised by statistics of fixed number")
    _mark_statistics(tracer, x, axes=[0, *range(2, x.dim())])
    _require_two_values(tracer, x, [0, *range(2, x.dim())])
    _keep_labels(tracer, x, call)


def _require_two_values(tracer: Tracer, x: Tensor, axes: Iterable[int]) -> None:
    """Let statistics be of two values at least, since one has no variance: torch refuses to normalise it."""
    longer = [axis for axis in axes if x.shape[axis] > 1]
    if len(longer) == 1:
        tracer.require_two(tracer.labels(x, longer[0]))


def _tie_per_channel(tracer: Tracer, x: Tensor, tensors: Iterable[Tensor | None], why: str) -> None:
    """Tie the channels of (batch, channels, ...) to tensors that hold one value for each."""
    channels = tracer.labels(x, 1)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            values = tracer.labels(tensor, 0)
            tracer.tie(channels, values, why)


def _keep_labels(tracer: Tracer, x: Tensor, call: Call) -> None:
    """Give the first output, which is the normalised one, the labels of the input."""
    labels_by_axis = tracer.all_labels(x)
    normalised = call.outputs[0]
    tracer.set_labels(normalised, labels_by_axis)


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """Tie the channels to the affine parameters; not mask-exact, because the statistics are over all channels."""
    x, normalized_shape, *affine = call.args[:4]
    _mark_statistics(tracer, x, axes=_last_axes(x, len(normalized_shape)))
    tracer.mark_kind(tracer.labels(x, -1), "stream")
    normalised = call.outputs[0]
    _combine_affine(tracer, x, affine, normalised)


@rule("torch.nn.modules.normalization.RMSNorm")
def rms_norm(tracer: Tracer, call: Call) -> None:
    """Treat the module as the operator that computes it; on its own it runs as a mean and several other operators."""
    module = call.operator
    x = call.argument(0, "x")
    _mark_statistics(tracer, x, axes=_last_axes(x, len(module.normalized_shape)))
    tracer.mark_kind(tracer.labels(x, -1), "stream")
    _combine_affine(tracer, x, [module.weight], call.output)


def _last_axes(x: Tensor, count: int) -> Iterable[int]:
    """Return the last axes of a tensor."""
    return range(x.dim() - count, x.dim())


def _mark_statistics(tracer: Tracer, x: Tensor, axes: Iterable[int]) -> None:
    """Mark the channels along the axes that statistics are taken over."""
    for axis in axes:
        tracer.mark_not_mask_exact(tracer.labels(x, axis), _FEWER)


def _combine_affine(tracer: Tracer, x: Tensor, affine: Iterable[Any], output: Tensor) -> None:
    parameters = [value for value in affine if isinstance(value, Tensor)]
    combine(tracer, [x, *parameters], output)


@rule("aten.native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """Tie the channels of a normalisation group: its statistics do not depend on the other groups.

    Where there is one group, its channels are not mask-exact, as are those along the axes behind, which are averaged
    over.
    """
    x, *weight_and_bias = call.args[:3]
    groups = call.args[6]
    _mark_statistics(tracer, x, axes=range(2, x.dim()))
    _tie_per_channel(tracer, x, weight_and_bias, "is normalised by parameters of fixed number")
    if x.shape[1] == groups:
        _require_two_values(tracer, x, range(2, x.dim()))
    elif groups == 1:
        _require_two_values(tracer, x, range(1, x.dim()))
    channels = tracer.labels(x, 1)
    if not _is_in_groups(tracer, call):
        _mark_statistics(tracer, x, axes=[1])
    elif channels is not None:
        by_group = channels.view(groups, -1)  # (groups, channels of a group)
        same_in_group = by_group[:, :1].expand_as(by_group)
        tracer.tie(channels, same_in_group.reshape(-1), "is normalised in groups")
        tracer.computes_with(by_group.shape[1])
    _keep_labels(tracer, x, call)


def _is_in_groups(tracer: Tracer, call: Call) -> bool:
    """Tell whether there are several groups, or were before all but one of them were pruned."""
    weight = call.args[1]
    name = tracer.name_of(weight) or tracer.where() + tracer.line()
    if call.args[6] > 1:
        tracer.grouped.add(name)
    return name in tracer.grouped


@rule("aten._weight_norm_interface")
def weight_norm(tracer: Tracer, call: Call) -> None:
    """Scale the slices of a weight along one axis to given norms; not mask-exact along the others, which norms sum."""
    direction, norms = call.args[:2]
    dim = call.argument(2, "dim", 0)
    scaled_axis = dim % direction.dim()
    labels_by_axis = tracer.all_labels(direction)
    for axis, labels in labels_by_axis.items():
        if axis != scaled_axis:
            tracer.mark_not_mask_exact(labels, "counts in the norm that a weight is divided by")
    weight = call.outputs[0]
    combine(tracer, [direction, norms], weight)


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(tracer: Tracer, call: Call) -> None:
    """Make the channels along the axis unprunable; no output is zero where the input is."""
    along_axis(tracer, call)
    for output in call.outputs:
        tracer.shift_zero(output)


@rule("aten.cumsum", "aten.cumprod", "aten.sort")
def along_axis(tracer: Tracer, call: Call) -> None:
    """Make the channels along the axis unprunable, because each depends on the others; keep those of other axes."""
    x = call.args[0]
    axis = call.argument(1, "dim", -1)
    labels = tracer.labels(x, axis)
    tracer.mark_unprunable(labels, f"runs {plain_name(call)} along its channels")
    same_shape(tracer, call)
