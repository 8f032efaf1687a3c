"""Layout in which a model runs fastest: channels last in memory, and batch normalisation folded into convolutions.

Both change the modules of a model for good; they are for the twin of a model.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_prune.graph.substitution import replace_tensors

__all__ = ["FoldablePair", "fold", "foldable", "put_channels_last"]

T = TypeVar("T")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldablePair:
    """A convolution, and the batch normalisation whose input is what it returns, by their names."""

    convolution: str
    norm: str


def put_channels_last(model: nn.Module, run: Callable[[], T]) -> T:
    """Let the 2-d convolutions of a model on the CPU work with the channels last in memory, which is faster there.

    Where the model then fails, as one does that calls ``view`` on what convolutions return, it keeps its own weights.

    Args:
        model: The model; its convolutions are given copies of their weights.
        run: A pass to try.

    Returns:
        What the pass returns.
    """
    weights = [weight for weight in model.parameters() if weight.dim() == 4 and weight.device.type == "cpu"]
    copies = {id(weight): _with_channels_last(weight) for weight in weights}
    _put_everywhere(model, copies)
    try:
        return run()
    except Exception:  # whatever a model may raise that looks at strides; what fails anyway raises again
        originals = {id(copies[id(weight)]): weight for weight in weights}
        _put_everywhere(model, originals)
        return run()


def _with_channels_last(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.channels_last)


def _put_everywhere(model: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    for module in model.modules():
        replace_tensors(module, tensors)


def foldable(model: nn.Module, run: Callable[[], T]) -> tuple[T, list[FoldablePair]]:
    """Run a pass, and find the convolutions whose result goes into a batch normalisation.

    Whether anything else uses the result is not looked for: what `fold` makes of the model has to be tried out.

    Args:
        model: The model, in evaluation mode.
        run: The pass.

    Returns:
        What the pass returns, and the pairs; modules that run several times are in none.
    """
    finder = _PairFinder(model)
    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) in _CONVOLUTIONS:
                hooks.enter_context(module.register_forward_hook(finder.note_result))
            if type(module) in _NORMALISATIONS:
                hooks.enter_context(module.register_forward_pre_hook(finder.note_input))
        result = run()
    return result, finder.pairs_called_once()


class _PairFinder:
    """Hooks that find which convolution has returned what a normalisation is given.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._calls: Counter[str] = Counter()
        self._results: dict[int, tuple[ref[Tensor], str]] = {}  # by id of the tensor that a convolution returned
        self._pairs: list[FoldablePair] = []

    def note_result(self, module: Any, args: Any, result: Any) -> None:
        name = self._names[module]
        self._calls[name] += 1
        if isinstance(result, Tensor):  # and not what a hook has made of it
            self._results[id(result)] = ref(result), name

    def note_input(self, module: Any, args: Any) -> None:
        name = self._names[module]
        self._calls[name] += 1
        if not args or module.running_mean is None:  # no arguments where the input is passed by name
            return
        convolution = self._convolution_before(args[0])
        if convolution is not None:
            self._pairs.append(FoldablePair(convolution, name))

    def _convolution_before(self, value: Any) -> str | None:
        if id(value) not in self._results:
            return None
        result, convolution = self._results[id(value)]
        return convolution if result() is value else None  # the id may be that of another tensor by now

    def pairs_called_once(self) -> list[FoldablePair]:
        calls = self._calls
        return [pair for pair in self._pairs if calls[pair.convolution] == calls[pair.norm] == 1]


def fold(model: nn.Module, pairs: list[FoldablePair]) -> None:
    """Let convolutions do what the batch normalisations behind them do in evaluation mode, and those nothing.

    Args:
        model: The model, or a twin of it.
        pairs: What `foldable` has found.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> model[1].running_mean.fill_(3.0)
        tensor([3., 3.])
        >>> x = torch.ones(1, 1, 1, 1)
        >>> before, pairs = foldable(model, lambda: model(x))
        >>> fold(model, pairs)
        >>> torch.allclose(model[0](x), before), model[1](x) is x
        (True, True)
    """
    for pair in pairs:
        convolution = cast(_ConvNd, model.get_submodule(pair.convolution))
        norm = cast(_BatchNorm, model.get_submodule(pair.norm))
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # else the normalisation is in no pair
        assert variance is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        convolution._parameters["weight"] = weight
        convolution._parameters["bias"] = bias
        norm.__dict__["forward"] = nn.Identity().forward
