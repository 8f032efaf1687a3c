"""Inputs of a model as the exporters take them, and outputs as they are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.entry import as_call

__all__ = ["Inputs", "Run", "flat_tensors", "free_batch_axis", "random_call", "random_inputs", "reason"]

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


def reason(raised: BaseException) -> str:
    """Return the first line of the first error in a row of errors that caused each other."""
    while raised.__cause__ is not None:
        raised = raised.__cause__
    lines = [line for line in str(raised).splitlines() if line.strip()]
    return lines[0] if lines else type(raised).__name__
