"""Operators that pool, resize or reduce."""

from typing import Any

from torch import Tensor

from lightning_prune.graph.rules.table import Rule, rule
from lightning_prune.graph.tracer import Call, Tracer

__all__: list[str] = []


def _spatial(axes: int) -> Rule:
    def spatial(tracer: Tracer, call: Call) -> None:
        """Keep the labels of all but the last axes, which are pooled or resized."""
        x = call.args[0]
        kept = {}
        for axis, labels in tracer.all_labels(x).items():
            if axis >= x.dim() - axes:
                tracer.mark_unprunable(labels, "is a spatial axis that is pooled or resized")
            else:
                kept[axis] = labels
        for output in call.outputs:
            tracer.set_labels(output, kept)

    return spatial


for _axes, _operators in {
    1: (
        "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d", "reflection_pad1d",
        "replication_pad1d", "_upsample_nearest_exact1d",
    ),
    2: (
        "avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
        "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "reflection_pad2d",
        "replication_pad2d", "adaptive_avg_pool2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
        "fractional_max_pool2d", "grid_sampler_2d", "max_unpool2d",
    ),
    3: (
        "avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
        "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d", "_upsample_nearest_exact3d",
        "grid_sampler_3d",
    ),
}.items():  # fmt: skip
    rule(*(f"aten.{name}" for name in _operators))(_spatial(_axes))


def _reduced_axes(x: Tensor, axes: Any) -> set[int]:
    if axes is None or axes == []:
        return set(range(x.dim()))
    return {axis % x.dim() for axis in ([axes] if isinstance(axes, int) else axes)}


_AXES_SECOND = {"aten.linalg_vector_norm", "aten.norm"}  # an order comes before the axes


@rule(
    "aten.mean", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.max", "aten.min", "aten.prod", "aten.median",
    "aten.linalg_vector_norm", "aten.norm", "aten.any", "aten.all", "aten.argmax", "aten.argmin", "aten.logsumexp",
    "aten.var_mean", "aten.std_mean", "aten.aminmax",
)  # fmt: skip
def reduction(tracer: Tracer, call: Call) -> None:
    """Drop the reduced axes; channels that are reduced over stay whole."""
    reduced = _reduced_axes(call.args[0], call.argument(2 if call.name in _AXES_SECOND else 1, "dim"))
    for axis in reduced:
        tracer.mark_unprunable(
            tracer.labels(call.args[0], axis), f"takes {call.name.removeprefix('aten.')} over its channels"
        )
    _drop(tracer, call, reduced)


@rule("aten.sum", "aten.nansum")
def summation(tracer: Tracer, call: Call) -> None:
    """Drop the summed axes; what a removed channel held is then missing from the sum."""
    reduced = _reduced_axes(call.args[0], call.argument(1, "dim"))
    for axis in reduced:
        tracer.mark_not_mask_exact(
            tracer.labels(call.args[0], axis), "is summed over its channels, and no weight can mask one"
        )
    _drop(tracer, call, reduced)


def _drop(tracer: Tracer, call: Call, reduced: set[int]) -> None:
    x = call.args[0]
    for output in call.outputs:
        keeps = output.dim() == x.dim()
        kept = {
            axis - (0 if keeps else sum(other < axis for other in reduced)): labels
            for axis, labels in tracer.all_labels(x).items()
            if axis not in reduced
        }
        tracer.set_labels(output, kept)
