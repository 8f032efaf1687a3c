"""The form in which a model runs fastest: channels last in memory, and normalisation as part of the convolution before.

Both change the modules of a model for good; they are for use where every attribute is given back afterwards.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_prune.graph.substitution import replace_tensors

__all__ = ["Pair", "fold", "foldable", "put_channels_last"]

T = TypeVar("T")

Pair = tuple[_ConvNd, _BatchNorm]
"""A convolution, and the batch normalisation that reads what it returns."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def put_channels_last(model: nn.Module, run: Callable[[], T]) -> T:
    """Let the 2-d convolutions of a model on the CPU work with the channels last in memory, which is faster there.

    Where the model then fails, as one does that calls ``view`` on what convolutions return, it stays as it was.

    Args:
        model: The model; its convolutions are given copies of their weights.
        run: A pass to try.

    Returns:
        What the pass returns.
    """
    own = {id(p): p for p in model.parameters() if p.dim() == 4 and p.device.type == "cpu"}
    copies = {key: p.detach().clone(memory_format=torch.channels_last) for key, p in own.items()}
    _put(model, copies)
    try:
        return run()
    except Exception:  # whatever a model may raise that looks at strides; what fails anyway raises again
        _put(model, {id(copy): own[key] for key, copy in copies.items()})
        return run()


def _put(model: nn.Module, tensors: dict[int, Tensor]) -> None:
    for module in model.modules():
        replace_tensors(module, tensors)


def foldable(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Pair]]:
    """Run a pass, and find the convolutions whose result goes into a batch normalisation.

    Whether anything else reads the result is not looked for: what `fold` makes of the model has to be tried out.

    Args:
        model: The model, in evaluation mode.
        run: The pass.

    Returns:
        What the pass returns, and the pairs; modules that run several times are in none.
    """
    calls: Counter[nn.Module] = Counter()
    made: dict[int, tuple[Any, _ConvNd]] = {}  # by `id` of the tensor that a convolution returned
    pairs: list[Pair] = []

    def note_result(module: _ConvNd, args: Any, result: Any) -> None:
        calls[module] += 1
        if isinstance(result, Tensor):  # and not what a hook has made of it
            made[id(result)] = ref(result), module

    def note_input(module: _BatchNorm, args: Any) -> None:
        calls[module] += 1
        found = made.get(id(args[0])) if args else None  # none where the input is passed by name
        if found is not None and found[0]() is args[0] and module.running_mean is not None:
            pairs.append((found[1], module))

    handles = [m.register_forward_hook(note_result) for m in model.modules() if type(m) in _CONVOLUTIONS]
    handles += [m.register_forward_pre_hook(note_input) for m in model.modules() if type(m) in _NORMALISATIONS]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result, [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def fold(pairs: list[Pair]) -> None:
    """Let convolutions do what the batch normalisations behind them do in evaluation mode, and those nothing.

    Args:
        pairs: What `foldable` has found.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> model[1].running_mean.fill_(3.0)
        tensor([3., 3.])
        >>> x = torch.ones(1, 1, 1, 1)
        >>> before, pairs = foldable(model, lambda: model(x))
        >>> fold(pairs)
        >>> torch.allclose(model[0](x), before), model[1](x) is x
        (True, True)
    """
    for convolution, norm in pairs:
        weight, bias = convolution.weight, convolution.bias
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # else the normalisation is in no pair
        assert variance is not None
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
        convolution._parameters["weight"], convolution._parameters["bias"] = fused
        norm.__dict__["forward"] = nn.Identity().forward
