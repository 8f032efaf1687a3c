"""Bounds of actions: clipping to them, and drawing uniformly between them."""

import torch
from torch import Tensor

__all__ = ["clip", "uniform"]


def clip(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Move entries that are out of bounds to the nearest bound.

    Args:
        action: (..., action).
        low: (..., action) least action.
        high: (..., action) greatest action.

    Example:
        >>> clip(torch.tensor([-1.0, 0.5, 3.0]), torch.zeros(3), torch.ones(3))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.minimum(torch.maximum(action, low), high)


def uniform(low: Tensor, high: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw actions that are equally probable everywhere between their bounds.

    Args:
        low: (..., action) least action.
        high: (..., action) greatest action.
        shape: (..., action) shape to draw; it is broadcast with those of the bounds.
        generator: Source of random numbers, on the CPU.

    Example:
        >>> actions = uniform(torch.zeros(2), torch.ones(2), (3, 2), torch.Generator().manual_seed(0))
        >>> actions.shape
        torch.Size([3, 2])
    """
    shape = torch.broadcast_shapes(shape, low.shape, high.shape)
    share = torch.rand(shape, generator=generator).to(low.device)
    return clip(low + share * (high - low), low, high)
