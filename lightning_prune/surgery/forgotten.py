"""Optimizers that a prune was not told of: their next step says so, where torch would speak of sizes that do not match.

Nothing leads from a model to the optimizers that train it, so a prune cannot know of one. But torch lets code look at
each optimizer before it steps. That is asked for where parameters were pruned that no given optimizer trains, and given
up as soon as optimizers that fit them have stepped.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.surgery.optimizer_contents import shape_of

__all__ = ["expect_others"]


def expect_others(tensors: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Look at optimizers that step from now on, if they are to train tensors that were pruned.

    Args:
        tensors: Parameters and buffers that have other shapes now.
        optimizers: Those whose state has followed.
    """
    followed = {id(each) for one in optimizers for group in one.param_groups for each in group["params"]}
    others = [tensor for tensor in tensors if tensor.requires_grad and id(tensor) not in followed]
    if others:
        _WATCH.begin(others)


class _Watch:
    """The look at optimizers before they step, in this process.

    Attributes:
        pruned: The parameters that an optimizer may not know to be smaller.
        seen: The optimizers that have been looked at since.
    """

    def __init__(self) -> None:
        self.pruned = WeakTensorKeyDictionary()
        self.seen: WeakSet[Optimizer] = WeakSet()
        self._handle: RemovableHandle | None = None

    def begin(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.pruned[tensor] = True
        self.seen.clear()
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self.look)

    def look(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise a RuntimeError if what an optimizer keeps is of a parameter as it was before a prune."""
        if optimizer in self.seen:
            return
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor in self.pruned:
                    _refuse_outdated(optimizer, tensor)
                    del self.pruned[tensor]
        self.seen.add(optimizer)
        if not len(self.pruned) and self._handle is not None:
            self._handle.remove()
            self._handle = None


_WATCH = _Watch()


def _refuse_outdated(optimizer: Optimizer, tensor: Tensor) -> None:
    for key, value in optimizer.state.get(tensor, {}).items():
        if not isinstance(value, Tensor) or value.dim() != tensor.dim() or value.numel() <= 1:
            continue
        sizes = zip(value.shape, tensor.shape, strict=True)
        if any(size not in (1, full_size) for size, full_size in sizes):  # 1 where a state is factored
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps {key!r} in shape {shape_of(value)} for a parameter that has been "
                f"pruned to {shape_of(tensor)} without it; name it where you prune, lightning_prune.prune(model, plan, "
                "optimizers=optimizer), or make a new one afterwards."
            )
