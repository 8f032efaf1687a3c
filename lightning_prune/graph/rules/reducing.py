"""Operators that pool, resize or reduce."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.graph.rules.elementwise import combine
from lightning_prune.graph.rules.table import plain_name, rule
from lightning_prune.graph.tracer import Call, Tracer, tensors_in

__all__: list[str] = []

_RETURN_NUMBERS = frozenset({"aten.max", "aten.min", "aten.median", "aten.nanmedian"})
_LOCAL_RESPONSE_NORM = F.local_response_norm.__code__


# -- pooling and resizing ----------------------------------------------------------------------------------------------


@rule(
    "aten.avg_pool1d", "aten.adaptive_avg_pool1d", "aten.upsample_nearest1d", "aten.upsample_linear1d",
    "aten.reflection_pad1d", "aten.replication_pad1d", "aten._upsample_nearest_exact1d",
)  # fmt: skip
def resize_1d(tracer: Tracer, call: Call) -> None:
    """Keep the channels along all axes but the last one, which is pooled or resized."""
    _resize(tracer, call, 1)


@rule(
    "aten.avg_pool2d", "aten.max_pool2d_with_indices", "aten._adaptive_avg_pool2d", "aten.adaptive_max_pool2d",
    "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten._upsample_nearest_exact2d",
    "aten.reflection_pad2d", "aten.replication_pad2d", "aten.adaptive_avg_pool2d", "aten._upsample_bilinear2d_aa",
    "aten._upsample_bicubic2d_aa", "aten.fractional_max_pool2d", "aten.grid_sampler_2d", "aten.max_unpool2d",
)  # fmt: skip
def resize_2d(tracer: Tracer, call: Call) -> None:
    """Keep the channels along all axes but the last two, which are pooled or resized."""
    _resize(tracer, call, 2)


@rule(
    "aten.avg_pool3d", "aten.max_pool3d_with_indices", "aten._adaptive_avg_pool3d", "aten.adaptive_max_pool3d",
    "aten.upsample_nearest3d", "aten.upsample_trilinear3d", "aten.reflection_pad3d", "aten.replication_pad3d",
    "aten._upsample_nearest_exact3d", "aten.grid_sampler_3d",
)  # fmt: skip
def resize_3d(tracer: Tracer, call: Call) -> None:
    """Keep the channels along all axes but the last three, which are pooled or resized."""
    _resize(tracer, call, 3)


def _resize(tracer: Tracer, call: Call, spatial_axes: int) -> None:
    x = call.args[0]
    why = "is a spatial axis that is pooled or resized"
    if tracer.inside(_LOCAL_RESPONSE_NORM):  # which pools the squares of the channels
        why = "is normalised by its neighbouring channels"
    first_spatial_axis = x.dim() - spatial_axes
    kept = {}
    labels_by_axis = tracer.all_labels(x)
    for axis, labels in labels_by_axis.items():
        if axis < first_spatial_axis:
            kept[axis] = labels
        else:
            tracer.mark_unprunable(labels, why)
    for output in call.outputs:
        tracer.set_labels(output, kept)


# -- reducing ----------------------------------------------------------------------------------------------------------


@rule(
    "aten.mean", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.max", "aten.min", "aten.prod", "aten.median",
    "aten.any", "aten.all", "aten.logsumexp", "aten.var_mean", "aten.std_mean", "aten.aminmax", "aten.nanmedian",
)  # fmt: skip
def reduction(tracer: Tracer, call: Call) -> None:
    """Reduce channels, which is not mask-exact: of fewer of them there is another mean, maximum ...

    An operator that also returns the numbers of what it found makes channels unprunable where these are used.
    """
    dim = call.argument(1, "dim")
    _reduce(tracer, call, dim)
    if call.name in _RETURN_NUMBERS:
        _number(tracer, call, dim)


def _number(tracer: Tracer, call: Call, dim: Any) -> None:
    """Say of which channels the second output holds numbers, if there is one."""
    x = call.args[0]
    numbered = []
    for axis in _axes(x, dim):
        labels = tracer.labels(x, axis)
        if labels is not None:
            numbered.append(labels)
    for numbers in call.outputs[1:]:
        tracer.set_numbered(numbers, numbered)


@rule("aten.argmax", "aten.argmin")
def number_of_channel(tracer: Tracer, call: Call) -> None:
    """Make the channels along the axes unprunable, since what is returned is the number of one."""
    x = call.args[0]
    reduced = _axes(x, call.argument(1, "dim"))
    for axis in reduced:
        labels = tracer.labels(x, axis)
        tracer.mark_unprunable(labels, f"takes {plain_name(call)} over its channels")
    _label_without(tracer, call, reduced)


@rule("aten.linalg_vector_norm", "aten.norm")
def norm(tracer: Tracer, call: Call) -> None:
    """Reduce the axes, which come after the order of the norm among the arguments."""
    x = call.args[0]
    dim = call.argument(2, "dim")
    order = call.argument(1, "ord", 2)
    counts_no_zeros = isinstance(order, int | float) and 0 < order < float("inf")
    mark = partial(tracer.mark_normed, tensor=x) if counts_no_zeros else tracer.mark_not_mask_exact
    reduced = _axes(x, dim)
    for axis in reduced:
        mark(tracer.labels(x, axis), why=f"takes {plain_name(call)} over its channels")
    _label_without(tracer, call, reduced)


def _reduce(tracer: Tracer, call: Call, dim: Any) -> None:
    x = call.args[0]
    why = f"takes {plain_name(call)} over its channels"
    reduced = _axes(x, dim)
    for axis in reduced:
        labels = tracer.labels(x, axis)
        if labels is not None and tracer.where() in tracer.free_modules:  # the weights of all heads, often for nobody
            tracer.mark_when_used(call.output, labels, why)
        else:
            tracer.mark_not_mask_exact(labels, why)
    _label_without(tracer, call, reduced)


@rule("aten.sum", "aten.nansum")
def summation(tracer: Tracer, call: Call) -> None:
    """Sum channels up, which is not mask-exact: what a pruned channel added to the sum is then missing from it."""
    x = call.args[0]
    dim = call.argument(1, "dim")
    summed = _axes(x, dim)
    for axis in summed:
        labels = tracer.labels(x, axis)
        tracer.mark_not_mask_exact(labels, "is summed over its channels, and no weight can mask one")
    _label_without(tracer, call, summed)


@rule(
    "aten.mse_loss", "aten.smooth_l1_loss", "aten.huber_loss", "aten.soft_margin_loss", "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
)  # fmt: skip
def elementwise_loss(tracer: Tracer, call: Call) -> None:
    """Tie the channels that are compared; a mean or sum over them is not mask-exact."""
    tensors = tensors_in(call.args)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    if call.output.shape == shape:
        combine(tracer, tensors, call.output)
        return
    compared = torch.empty(shape, device="meta")
    combine(tracer, tensors, compared)
    for labels in tracer.all_labels(compared).values():
        tracer.mark_not_mask_exact(labels, f"takes {plain_name(call)} over its channels")


def _axes(x: Tensor, dim: Any) -> set[int]:
    """Return the axes that a ``dim`` argument names: all of them where it is None or empty."""
    if dim is None or dim == []:
        return set(range(x.dim()))
    if isinstance(dim, int):
        dim = [dim]
    return {axis % x.dim() for axis in dim}


def _label_without(tracer: Tracer, call: Call, reduced: Collection[int]) -> None:
    """Keep the labels along the axes that are not reduced; the reduced ones may be kept with a single position."""
    x = call.args[0]
    for output in call.outputs:
        keeps_axes = output.dim() == x.dim()
        output_labels = {}
        for axis, labels in tracer.all_labels(x).items():
            if axis not in reduced:
                dropped = [] if keeps_axes else [other for other in reduced if other < axis]
                output_labels[axis - len(dropped)] = labels
        tracer.set_labels(output, output_labels)
