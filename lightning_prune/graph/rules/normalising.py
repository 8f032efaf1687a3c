"""Normalisation."""

from torch import Tensor

from lightning_prune.graph.rules.elementwise import combine
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Tracer

__all__: list[str] = []


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
    tracer.set_labels(call.outputs[0], tracer.all_labels(x))


@rule("aten.native_layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """Tie the channels to the affine parameters; the statistics are over all channels, so that removal is inexact."""
    x, shape = call.args[0], call.args[1]
    affine = [tensor for tensor in call.args[2:4] if isinstance(tensor, Tensor)]
    for axis in range(x.dim() - len(shape), x.dim()):
        tracer.mark_not_mask_exact(
            tracer.labels(x, axis), "is normalised over its channels, fewer of which have other statistics"
        )
    combine(tracer, [x, *affine], call.outputs[0])


@rule("torch.nn.modules.normalization.RMSNorm")
def rms_norm(tracer: Tracer, call: Call) -> None:
    """Treat the module as the operator that it would run, were that not taken apart into a mean and more."""
    module = call.operator
    x = call.argument(0, "x")
    layer_norm(tracer, Call(module, (x, module.normalized_shape, module.weight), {}, call.output))


@rule("aten.native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """Let whole groups of channels leave; a group's statistics do not depend on the other groups."""
    x, groups = call.args[0], call.args[6]
    labels = tracer.labels(x, 1)
    for stored in call.args[1:3]:
        if isinstance(stored, Tensor):
            tracer.tie(labels, tracer.labels(stored, 0), "is normalised by parameters of fixed number")
    if labels is not None:
        first = labels.view(groups, -1)[:, :1].expand(groups, len(labels) // groups).reshape(-1)
        tracer.tie(labels, first, "is normalised in groups")
        tracer.computes_with(len(labels) // groups)
    tracer.set_labels(call.outputs[0], tracer.all_labels(x))


@rule("aten._weight_norm_interface")
def weight_norm(tracer: Tracer, call: Call) -> None:
    """Scale the slices of a weight along one axis to given lengths; a length is over all the other axes."""
    direction, length = call.args[:2]
    own = call.argument(2, "dim", 0) % direction.dim()
    for axis, labels in tracer.all_labels(direction).items():
        if axis != own:
            tracer.mark_not_mask_exact(labels, "is part of the length that a weight is normalised by")
    combine(tracer, [direction, length], call.outputs[0])


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.cumsum", "aten.cumprod", "aten.sort")
def along_one_axis(tracer: Tracer, call: Call) -> None:
    """Keep the labels; channels along the axis that is normalised or summed up stay whole."""
    x, axis = call.args[0], call.argument(1, "dim", -1)
    tracer.mark_unprunable(
        tracer.labels(x, axis), f"runs {call.name.removeprefix('aten.').lstrip('_')} along its channels"
    )
    for output in call.outputs:
        tracer.set_labels(output, tracer.all_labels(x))
        if call.name.endswith("softmax"):
            tracer.shift_zero(output)
