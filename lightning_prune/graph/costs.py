"""What each operator costs, as fvcore counts it: one fused multiply-add is one FLOP.

fvcore counts convolutions and matrix products by their multiply-adds, normalisation by passes over its input (two
with affine parameters in evaluation mode, one without), adaptive average pooling by its input and resizing by its
output; other operators are free. It is asked nothing about attention written as one operator, and counts it as free.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lightning_prune.graph.tracer import Call, Tracer

__all__ = ["COSTS"]

_INSTANCE_NORM = F.instance_norm.__code__
_ADAPTIVE_POOLING = F.adaptive_avg_pool2d.__code__

COSTS: dict[str, Callable[[Tracer, Call], None]] = {}


def _cost(*operators: str) -> Callable[[Callable[[Tracer, Call], None]], Callable[[Tracer, Call], None]]:
    def register(function: Callable[[Tracer, Call], None]) -> Callable[[Tracer, Call], None]:
        for operator in operators:
            COSTS[f"aten.{operator}"] = function
        return function

    return register


@_cost("convolution", "_convolution")
def _convolution(tracer: Tracer, call: Call) -> None:
    x, weight = call.args[0], call.args[1]
    transposed = call.argument(6, "transposed", False)
    channel = x.dim() - weight.dim() + 1
    positions = (x if transposed else call.output).shape[channel + 1 :].numel()
    batch = x.shape[:channel].numel()
    tracer.cost(batch * positions * weight.shape[2:].numel(), *tracer.axes(weight)[:2])


@_cost("mm", "bmm", "addmm", "baddbmm")
def _matrix_product(tracer: Tracer, call: Call) -> None:
    name = call.operator.overloadpacket.__name__
    left, right = call.args[1:3] if name in ("addmm", "baddbmm") else call.args[:2]
    if tracer.in_attention:
        tracer.in_attention = False
    elif name != "baddbmm":  # which fvcore has no count for
        tracer.cost(1, *tracer.axes(left), tracer.axes(right)[-1])


@_cost("_safe_softmax")
def _attention(tracer: Tracer, call: Call) -> None:
    """Attention as one operator runs as product, this softmax, product; fvcore counts nothing for it."""
    tracer.record.costs.pop()
    tracer.in_attention = True


def _passes(over: Callable[[Call], Tensor], passes: Callable[[Call], int]) -> Callable[[Tracer, Call], None]:
    def cost(tracer: Tracer, call: Call) -> None:
        tracer.cost(passes(call), *tracer.axes(over(call)))

    return cost


def _input(call: Call) -> Tensor:
    return call.args[0]


def _output(call: Call) -> Tensor:
    return call.output


@_cost("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def _batch_norm(tracer: Tracer, call: Call) -> None:
    """Normalisation of instances runs as one of batches, and counts as one that finds its statistics itself."""
    affine = call.argument(1, "weight") is not None
    passes = (5 if affine else 4) if tracer.inside(_INSTANCE_NORM) else (2 if affine else 1)
    tracer.cost(passes, *tracer.axes(call.args[0]))


_cost("native_layer_norm")(_passes(_input, lambda call: 5 if call.argument(2, "weight") is not None else 4))
_cost("native_group_norm")(_passes(_input, lambda call: 5 if call.argument(1, "weight") is not None else 4))
_cost("_adaptive_avg_pool2d")(_passes(_input, lambda call: 1))
_cost("upsample_nearest2d")(_passes(_output, lambda call: 1))
_cost("upsample_bilinear2d")(_passes(_output, lambda call: 4))


@_cost("mean")
def _mean(tracer: Tracer, call: Call) -> None:
    """Adaptive pooling to one pixel runs as a mean; a mean that somebody wrote is free."""
    if tracer.inside(_ADAPTIVE_POOLING):
        tracer.cost(1, *tracer.axes(call.args[0]))
