"""Output shapes of the operators that networks spend most of their calls on.

PyTorch knows the shape of every output, but finds it in Python code that takes up to milliseconds a call. A function
here returns an output without data, or NotImplemented wherever its arguments are not the plain case.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPES"]

Shape = Callable[..., Any]
SHAPES: dict[str, Shape] = {}


def _shape_of(*operators: str) -> Callable[[Shape], Shape]:
    """Register what returns the output of some operators on tensors without data."""

    def register(function: Shape) -> Shape:
        for operator in operators:
            SHAPES[operator] = function
        return function

    return register


@_shape_of("aten.convolution")
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    if transposed or not _fits_convolution(x, weight, bias, groups):
        return NotImplemented
    kernel = weight.shape[2:]
    steps = _per_axis(stride, kernel)
    paddings = _per_axis(padding, kernel)
    dilations = _per_axis(dilation, kernel)
    spatial = []
    for axis, kernel_size in enumerate(kernel):
        covered = dilations[axis] * (kernel_size - 1) + 1
        padded = x.shape[2 + axis] + 2 * paddings[axis]
        size = (padded - covered) // steps[axis] + 1
        if size < 1:
            return NotImplemented
        spatial.append(size)
    return _empty(x, (x.shape[0], weight.shape[0], *spatial))


def _fits_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    """Tell whether the arguments are of the plain case, (batch, in_channels, *spatial) and no error."""
    if not x.is_meta or x.dim() != weight.dim() or x.dtype != weight.dtype:
        return False
    out_channels, in_channels_of_group = weight.shape[:2]
    if out_channels % groups > 0 or x.shape[1] != in_channels_of_group * groups:
        return False
    return bias is None or bias.shape[0] == out_channels


def _per_axis(setting: list[int], kernel: Sequence[int]) -> list[int]:
    """Repeat a setting that is given once for all axes."""
    return setting * len(kernel) if len(setting) == 1 else setting


@_shape_of("aten.native_batch_norm", "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training")
def _batch_norm(x: Tensor, *arguments: Any) -> Any:
    if not x.is_meta or x.dim() < 2:
        return NotImplemented
    channels = x.shape[1:2]
    for per_channel in arguments:
        if isinstance(per_channel, Tensor) and not _is_like(per_channel, channels, x):
            return NotImplemented
    return _normalised(x)


@_shape_of("aten.native_layer_norm")
def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    normalized_shape = x.shape[-len(shape) :]
    if not x.is_meta or list(normalized_shape) != list(shape):
        return NotImplemented
    for parameter in (weight, bias):
        if parameter is not None and not _is_like(parameter, normalized_shape, x):
            return NotImplemented
    return _normalised(x)


@_shape_of("aten.native_group_norm")
def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *numbers: Any) -> Any:
    if x.dim() < 2 or not _is_plain(x):
        return NotImplemented
    of_channels = x.shape[1:2]
    for parameter in (weight, bias):
        if parameter is not None and not _is_like(parameter, of_channels, x):
            return NotImplemented
    samples, channels, positions, groups, _ = numbers
    if channels != x.shape[1] or channels % groups > 0:
        return NotImplemented
    covers_all = samples * channels * positions == x.numel()
    return _normalised(x) if covers_all else NotImplemented


def _is_like(tensor: Tensor, shape: torch.Size, x: Tensor) -> bool:
    return tensor.shape == shape and tensor.dtype == x.dtype


def _normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an output, and statistics that nothing looks at."""
    return _like(x), _empty(x, (0,)), _empty(x, (0,))


def _like(x: Tensor) -> Tensor:
    """Return another tensor of the same shape and layout; PyTorch's own function takes ten times longer."""
    if not x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of some shape, of the same type."""
    return torch.empty(shape, dtype=x.dtype, device="meta")


@_shape_of(
    "aten.relu", "aten.hardtanh", "aten.silu", "aten.gelu", "aten.hardswish", "aten.hardsigmoid", "aten.sigmoid",
    "aten.tanh", "aten.leaky_relu", "aten.elu", "aten.mish",
)  # fmt: skip
def _activation(x: Tensor, *numbers: Any, **named: Any) -> Any:
    if x.is_meta and x.is_floating_point():
        return _like(x)
    return NotImplemented


@_shape_of(
    "aten.relu_", "aten.hardtanh_", "aten.silu_", "aten.hardswish_", "aten.hardsigmoid_", "aten.sigmoid_",
    "aten.leaky_relu_", "aten.elu_", "aten.mish_",
)  # fmt: skip
def _activation_in_place(x: Tensor, *numbers: Any) -> Any:
    if x.is_meta and x.is_floating_point():
        return x
    return NotImplemented


@_shape_of("aten.add", "aten.mul", "aten.sub", "aten.div")
def _arithmetic(first: Tensor, second: Any, **named: Any) -> Any:
    if not first.is_meta or not first.is_floating_point() or "rounding_mode" in named:
        return NotImplemented
    if isinstance(second, Tensor) and _broadcasts(first, second):
        return _like(second)
    if _broadcasts(second, first):
        return _like(first)
    return NotImplemented


@_shape_of("aten.add_", "aten.mul_", "aten.sub_", "aten.div_")
def _arithmetic_in_place(first: Tensor, second: Any, **named: Any) -> Any:
    if not first.is_meta:
        return NotImplemented
    is_integer = isinstance(second, int) and not isinstance(second, bool)
    if is_integer or _broadcasts(second, first):
        return first
    return NotImplemented


def _broadcasts(value: Any, to: Tensor) -> bool:
    """Tell whether a value is a number, or a tensor that is repeated along some axes to the shape of another."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and to.is_floating_point()
    if not value.is_meta or value.dtype != to.dtype or value.dim() > to.dim():
        return False
    from_behind = zip(
        reversed(value.shape),
        reversed(to.shape),
        strict=False,
    )
    return all(size in (1, broadcast_size) for size, broadcast_size in from_behind)


@_shape_of("aten.addmm")
def _linear(bias: Tensor, rows: Tensor, weight: Tensor, **scales: Any) -> Any:
    if scales or not _multiplies(rows, weight):
        return NotImplemented
    if not _is_like(bias, weight.shape[1:], rows):
        return NotImplemented
    return _matrix_product(rows, weight)


@_shape_of("aten.mm")
def _matrix_product(rows: Tensor, weight: Tensor) -> Any:
    if not _multiplies(rows, weight):
        return NotImplemented
    shape = rows.shape[0], weight.shape[1]
    return _empty(rows, shape)


def _multiplies(rows: Tensor, weight: Tensor) -> bool:
    """Tell whether two matrices without data can be multiplied."""
    if not rows.is_meta or not weight.is_meta or rows.dtype != weight.dtype:
        return False
    are_matrices = rows.dim() == 2 and weight.dim() == 2
    return are_matrices and rows.shape[1] == weight.shape[0]


@_shape_of("aten.linear")
def _linear_layer(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if input.dim() < 2 or weight.dim() != 2 or not _are_alike(input, weight):
        return NotImplemented
    if input.shape[-1] != weight.shape[1]:
        return NotImplemented
    if bias is not None and not (bias.is_meta and _is_like(bias, weight.shape[:1], input)):
        return NotImplemented
    shape = *input.shape[:-1], weight.shape[0]
    return _empty(input, shape)


def _are_alike(*tensors: Tensor) -> bool:
    """Tell whether tensors without data are numbers of the same type."""
    types = {tensor.dtype for tensor in tensors}
    return len(types) == 1 and all(tensor.is_meta for tensor in tensors)


@_shape_of("aten.scaled_dot_product_attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *settings: Any, **named: Any) -> Any:
    is_grouped = named.get("enable_gqa", len(settings) > 2 and settings[2])
    if attn_mask is not None or is_grouped or not _are_alike(query, key, value):
        return NotImplemented
    if not query.dim() == key.dim() == value.dim() or query.dim() < 3:
        return NotImplemented
    is_same_batch = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not is_same_batch or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return NotImplemented
    shape = *query.shape[:-1], value.shape[-1]
    return _empty(query, shape)


@_shape_of("aten.mean")
def _mean(x: Tensor, axes: list[int] | None = None, keep_axes: bool = False, **named: Any) -> Any:
    if not axes or named or not _is_plain(x):
        return NotImplemented
    reduced = _positive(axes, x)
    if len(reduced) != len(axes):
        return NotImplemented
    shape = []
    for axis, size in enumerate(x.shape):
        if axis not in reduced:
            shape.append(size)
        elif keep_axes:
            shape.append(1)
    return _empty(x, shape)


def _is_plain(x: Tensor) -> bool:
    """Tell whether a tensor has no data, and its output the plain layout."""
    return x.is_meta and x.is_contiguous() and x.is_floating_point()


def _positive(axes: Sequence[int], x: Tensor) -> set[int]:
    """Return those of some axes that a tensor has, counted from the front."""
    dimensions = x.dim()
    return {axis % dimensions for axis in axes if -dimensions <= axis < dimensions}


@_shape_of("aten.roll")
def _roll(x: Tensor, shifts: list[int], axes: Sequence[int] = ()) -> Any:
    rolled = _positive(axes, x)
    as_many = len(shifts) == len(axes) == len(rolled)
    return _like(x) if as_many and _is_plain(x) else NotImplemented


@_shape_of("aten.cat")
def _cat(tensors: list[Tensor], axis: int = 0) -> Any:
    first = tensors[0]
    if not _positive([axis], first):
        return NotImplemented
    shape = list(first.shape)
    shape[axis] = 0
    for tensor in tensors:
        if not _is_plain(tensor) or tensor.dtype != first.dtype:
            return NotImplemented
        if not _differ_along(tensor.shape, first.shape, axis):
            return NotImplemented
        shape[axis] += tensor.shape[axis]
    return _empty(first, shape)


def _differ_along(shape: Sequence[int], other: Sequence[int], axis: int) -> bool:
    """Tell whether two shapes are equal but for one axis."""
    if len(shape) != len(other):
        return False
    changed = list(shape)
    changed[axis] = other[axis]
    return changed == list(other)


@_shape_of(
    "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d", "aten.upsample_linear1d",
    "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten.upsample_bicubic2d",
)  # fmt: skip
def _upsample(x: Tensor, size: list[int] | None, *settings: Any) -> Any:
    """Return an output of a size; where a scale is given instead, PyTorch does the rounding."""
    if size is None or len(size) != x.dim() - 2:
        return NotImplemented
    if min(size) < 1 or 0 in x.shape or not x.is_meta or not x.is_floating_point():
        return NotImplemented
    shape = *x.shape[:2], *size
    if x.is_contiguous():
        return _empty(x, shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last)
    return NotImplemented


@_shape_of("aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def _softmax(x: Tensor, axis: int, to_float: bool = False, **named: Any) -> Any:
    if to_float or named or not _positive([axis], x):
        return NotImplemented
    return _like(x) if _is_plain(x) else NotImplemented


@_shape_of("aten.grid_sampler_2d", "aten.grid_sampler_3d")
def _grid_sampler(x: Tensor, grid: Tensor, *settings: Any) -> Any:
    spatial = grid.shape[1:-1]
    if x.dim() != grid.dim() or len(spatial) != grid.shape[-1]:
        return NotImplemented
    if x.shape[0] != grid.shape[0] or x.dtype != grid.dtype:
        return NotImplemented
    if 0 in x.shape or not _is_plain(x):
        return NotImplemented
    shape = *x.shape[:2], *spatial
    return _empty(x, shape)
