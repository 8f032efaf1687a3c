"""Inputs of a model as the exporters take them, and outputs as they are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.entry import as_call
from lightning_prune.planning.timing import placed

__all__ = [
    "Inputs",
    "Run",
    "flat_tensors",
    "free_batch_axis",
    "random_call",
    "random_inputs",
    "reason",
    "refuse_misfit",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments by position and by name."""
Run = Callable[[Inputs], list[Tensor]]
"""Runs what has been exported."""


def random_call(example_inputs: Any, batch_size: int) -> Inputs:
    """Return random inputs like some inputs, as arguments of a call.

    Args:
        example_inputs: What a ``forward`` takes, as for `lightning_prune.trace`.
        batch_size: The number of samples.
    """
    return as_call(random_inputs(example_inputs, batch_size))


def random_inputs(example_inputs: Any, size: int) -> Any:
    """Make random inputs like some inputs: normal numbers, or for integers, a choice of those that are there.

    Args:
        example_inputs: What a ``forward`` takes, as for `lightning_prune.trace`.
        size: The batch size.

    Example:
        >>> images, words = random_inputs((torch.zeros(1, 3, 8, 8), torch.tensor([[4, 4]])), size=2)
        >>> images.shape, words
        (torch.Size([2, 3, 8, 8]), tensor([[4, 4], [4, 4]]))
    """
    generator = torch.Generator().manual_seed(size)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0:
            return leaf.cpu()
        if leaf.is_floating_point():
            normal = torch.randn((size, *leaf.shape[1:]), generator=generator)
            return normal.to(leaf.dtype)
        rows = torch.randint(len(leaf), (size,), generator=generator)
        return leaf.cpu()[rows]

    return tree_map(draw, example_inputs)


def free_batch_axis(inputs: Inputs, word: Any) -> Any:
    """Say that the first axis of every tensor may have any length.

    Args:
        inputs: The inputs.
        word: What the exporter calls a length that is free.
    """

    def axes(leaf: Any) -> dict[int, Any] | None:
        return {0: word} if isinstance(leaf, Tensor) and leaf.dim() else None

    args, kwargs = tree_map(axes, inputs)
    return kwargs or args


def flat_tensors(nested: Any) -> list[Tensor]:
    """Return the tensors in nested values, in order."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def refuse_misfit(model: nn.Module, example_inputs: Any) -> None:
    """Raise a ValueError that says what a model takes, unless it runs on some inputs as they are.

    Args:
        model: The model, in evaluation mode.
        example_inputs: What its ``forward`` is said to take.
    """
    args, kwargs = placed(example_inputs, model)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as raised:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in flat_tensors((args, kwargs)))
        raise ValueError(
            f"Inputs of shape {shapes} do not fit {type(model).__name__} ({reason(raised)}); {_what_fits(model)}."
        ) from raised


def _what_fits(model: nn.Module) -> str:
    own = flat_tensors([getattr(model, "example_input_array", None)])
    if own:
        return "its example_input_array has shape " + " and ".join(str(tuple(tensor.shape)) for tensor in own)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            return f"its first layer, {name!r}, is {module}"
    return "give those that its forward takes"


def reason(raised: BaseException) -> str:
    """Return the first line of the first error in a row of errors that caused each other."""
    while raised.__cause__ is not None:
        raised = raised.__cause__
    lines = [line for line in str(raised).splitlines() if line.strip()]
    return lines[0] if lines else type(raised).__name__
