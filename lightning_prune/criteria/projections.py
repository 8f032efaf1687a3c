"""Projections inside multi-head attention, which are no modules: what they consume and produce, shown as they run."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.attention import free

__all__ = ["PROJECTIONS", "ProjectionWatch"]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The parameters of `torch.nn.MultiheadAttention` that queries, keys and values are computed with."""

OnRows = Callable[[str, Tensor, int], None]
"""Given the key of a place, the values there, and which row of the weight the first of them belongs to."""


class ProjectionWatch(TorchFunctionMode):
    """Show what the projections of multi-head attention consume and produce, within a block.

    Args:
        model: A twin of a model, whose attention runs its projections one by one from now on.
        on_rows: What is called with inputs, by the name of the weight, and with outputs, by its name and
            ``" (output)"``.
    """

    def __init__(self, model: nn.Module, on_rows: OnRows) -> None:
        super().__init__()
        self._on_rows = on_rows
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            free(module)
            if isinstance(module, nn.MultiheadAttention):
                for parameter in PROJECTIONS:
                    weight = getattr(module, parameter)
                    if weight is not None:
                        self._names[id(weight)] = f"{name}.{parameter}" if name else parameter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            values, weight, *_ = args
            whole = weight if weight._base is None else weight._base
            name = self._names.get(id(whole))
            if name is not None:
                self._on_rows(name, values, 0)
                self._on_rows(f"{name} (output)", output, weight.storage_offset() // weight.stride(0))
        return output
