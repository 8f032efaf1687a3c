"""Numbers that are not finite: which tensor of a model, or which batch, has them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.substitution import named_tensors

__all__ = ["REMEDY", "cause_in", "not_finite_in"]

REMEDY = "lower the learning rate, look at the data, or go back to an earlier checkpoint"


def not_finite_in(tensor: Tensor) -> str:
    """Say what numbers of a tensor are not finite: ``"NaN"``, ``"infinite numbers"``, or nothing.

    Args:
        tensor: The tensor.

    Example:
        >>> import torch
        >>> not_finite_in(torch.tensor([1.0, float("inf")]))
        'infinite numbers'
    """
    has_numbers = tensor.is_floating_point() or tensor.is_complex()
    if not has_numbers or tensor.is_meta:
        return ""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    if bool(values.isfinite().all()):
        return ""
    return "NaN" if bool(values.isnan().any()) else "infinite numbers"


def cause_in(model: nn.Module, batches: Iterable[Any] = (), first: int = 0) -> str:
    """Say which parameter, buffer or batch holds numbers that are not finite; nothing if there is none.

    Infinite numbers in buffers do not count: attention masks are made of them.

    Args:
        model: The model.
        batches: Batches of data.
        first: The number of the first of them.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> _ = model.bias.data.fill_(float("nan"))
        >>> cause_in(model), cause_in(nn.ReLU(), [torch.zeros(1), (torch.tensor([float("inf")]),)])
        ("the parameter 'bias' holds NaN", 'batch 1 (counted from 0) holds infinite numbers')
    """
    for name, tensor in named_tensors(model).items():
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        found = not_finite_in(tensor)
        if found == "NaN" or (found and kind == "parameter"):
            return f"the {kind} {name!r} holds {found}"
    for number, batch in enumerate(batches, first):
        for leaf in tree_leaves(batch):
            found = not_finite_in(leaf) if isinstance(leaf, Tensor) else ""
            if found:
                return f"batch {number} (counted from 0) holds {found}"
    return ""
