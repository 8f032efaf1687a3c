"""Operators that combine tensors element by element, or keep the shape of their input."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.sameness import same_along, set_same_along
from lightning_prune.graph.tracer import Call, Labels, Tracer, tensors_in

__all__ = ["ELEMENTWISE", "combine", "same_shape"]

_FIXED_SIZE = "is combined with a tensor of fixed size"

# What computes each element of its output from the elements of its arguments at the same place, and from numbers. The
# tag of that name, which PyTorch gives to more operators with each version, decides nothing here: a test says what it
# has that this table has not. Operators that work in place go by those without the underscore at their end.
_ELEMENTWISE = """
    _add_relu _conj _conj_copy _conj_physical _masked_scale _neg_view _neg_view_copy _prelu_kernel
    _prelu_kernel_backward abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan
    arctan2 arctanh asin asinh atan atan2 atanh binomial ceil celu clamp clamp_max clamp_min clip complex conj
    conj_physical copy copysign cos cosh deg2rad dequantize digamma div divide elu erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac frexp gcd gelu hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot i0 igamma igammac isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp leaky_relu lerp
    lgamma log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp logaddexp2 logit masked_fill maximum minimum
    mish mul multiply mvlgamma nan_to_num neg negative nextafter poisson polar polygamma positive pow rad2deg
    reciprocal relu relu6 remainder round rrelu rrelu_with_noise rrelu_with_noise_functional rsqrt rsub selu sgn
    sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold true_divide
    trunc where xlogy

    __and__ __lshift__ __or__ __rshift__ __xor__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor logical_and logical_not logical_or
    logical_xor eq ge greater greater_equal gt le less less_equal lt ne not_equal

    special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
    special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
    special_chebyshev_polynomial_w special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv
    special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln
    special_hermite_polynomial_h special_hermite_polynomial_he special_i0 special_i0e special_i1 special_i1e
    special_laguerre_polynomial_l special_legendre_polynomial_p special_log1p special_log_ndtr special_logit
    special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1
    special_multigammaln special_ndtr special_ndtri special_polygamma special_psi special_round
    special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
    special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
    special_shifted_chebyshev_polynomial_w special_sinc special_spherical_bessel_j0 special_xlog1py special_xlogy
    special_zeta

    elu_backward gelu_backward hardshrink_backward hardsigmoid_backward hardswish_backward hardtanh_backward
    infinitely_differentiable_gelu_backward leaky_relu_backward log_sigmoid_backward logit_backward mish_backward
    native_dropout_backward rrelu_with_noise_backward sigmoid_backward silu_backward softplus_backward
    softshrink_backward tanh_backward threshold_backward
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())


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
        self.fixed: set[int] = set()  # axes of the output along which positions of some tensor differ without labels

    def add(self, tensor: Tensor) -> None:
        """Add a tensor that the operator was given."""
        labels_by_axis = self.tracer.all_labels(tensor)
        same = same_along(tensor)
        output_axis = len(self.sizes) - tensor.dim()  # broadcasting adds axes in front
        for axis, size in enumerate(tensor.shape):
            labels = labels_by_axis.get(axis)
            if labels is not None or axis not in same:
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
        same = set(range(len(self.sizes))) - self.fixed - labelled
        set_same_along(self.output, frozenset(axis for axis in same if self.sizes[axis] > 1))


@rule("pointwise", "aten.copy_", *(f"aten.{name}" for name in ELEMENTWISE))
def pointwise(tracer: Tracer, call: Call) -> None:
    """Tie the channels of all arguments, which are broadcast together."""
    tensors = call.given
    has_weights = any(map(tracer.is_weight, tensors))
    shifts_zero = has_weights and not _keeps_zero(tracer, call)
    zero_tensors = [tensor for tensor in tensors if tracer.all_labels(tensor) and tracer.keeps_zero(tensor)]
    keeps_zero = bool(zero_tensors) and _is_zero_where(call, zero_tensors)
    for output in call.outputs:
        combine(tracer, tensors, output)
        if shifts_zero:
            tracer.shift_zero(output)
        if keeps_zero:
            tracer.keep_zero(output)


# What does the same to the tensors at equal places of lists, as the averages of weights are updated.
_OF_LISTS = """
    abs add addcdiv addcmul clamp_max clamp_min copy div lerp maximum minimum mul neg pow sqrt sub
"""
_FOREACH = [f"aten._foreach_{name}" for name in _OF_LISTS.split()]
_FOREACH_IN_PLACE = [f"{name}_" for name in _FOREACH]


@rule(*_FOREACH, *_FOREACH_IN_PLACE)
def foreach(tracer: Tracer, call: Call) -> None:
    """Tie the channels of the tensors at equal places of all lists."""
    arguments = [*call.args, *call.kwargs.values()]
    lists = [tensors_in(value) for value in arguments if isinstance(value, list | tuple)]
    lists = [tensors for tensors in lists if tensors]  # numbers may be in lists too
    outputs = call.outputs or lists[0]  # what works in place returns nothing
    for place, output in enumerate(outputs):
        together = [tensors[place] for tensors in lists]
        combine(tracer, together, output)


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
    zero_tensors = list(zero_tensors)
    zeros = [any(tensor is zero for zero in zero_tensors) for tensor in call.given]
    key = call.operator, tuple(zeros), repr(_numbers_of(call))
    if key not in _KNOWN:
        _KNOWN[key] = _runs_to_zero(call, zero_tensors)
    return _KNOWN[key]


_KNOWN: dict[Any, bool] = {}  # whether an operator returns zero, by what it is given


def _numbers_of(call: Call) -> Any:
    """Return the arguments of a call that are no tensors."""
    return tree_map(lambda value: None if isinstance(value, Tensor) else value, (call.args, call.kwargs))


def _runs_to_zero(call: Call, zero_tensors: Sequence[Tensor]) -> bool:
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
