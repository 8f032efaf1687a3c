"""Random actions: noise in the shape that is needed, clipping to bounds, and uniform draws between them."""

import torch
from torch import Tensor

__all__ = ["clip", "normal_noise", "uniform_actions", "uniform_noise"]


def normal_noise(generator: torch.Generator, *tensors: Tensor) -> Tensor:
    """Draw standard normal numbers in the shape that tensors broadcast to, on the device of the first one.

    Args:
        generator: Source of random numbers, on the CPU.
        *tensors: What the noise is to fit.

    Example:
        >>> normal_noise(torch.Generator().manual_seed(0), torch.zeros(3, 1), torch.zeros(2)).shape
        torch.Size([3, 2])
    """
    shapes = [tensor.shape for tensor in tensors]
    noise = torch.randn(torch.broadcast_shapes(*shapes), generator=generator)
    return noise.to(tensors[0].device)


def uniform_noise(generator: torch.Generator, *tensors: Tensor) -> Tensor:
    """Draw numbers that are uniform from 0 to 1, as `normal_noise` draws normal ones.

    Args:
        generator: Source of random numbers, on the CPU.
        *tensors: What the noise is to fit.

    Example:
        >>> uniform_noise(torch.Generator().manual_seed(0), torch.zeros(3, 1), torch.zeros(2)).shape
        torch.Size([3, 2])
    """
    shapes = [tensor.shape for tensor in tensors]
    noise = torch.rand(torch.broadcast_shapes(*shapes), generator=generator)
    return noise.to(tensors[0].device)


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
    at_least_low = torch.maximum(action, low)
    return torch.minimum(at_least_low, high)


def uniform_actions(generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
    """Draw actions that are equally probable everywhere between their bounds.

    Args:
        generator: Source of random numbers, on the CPU.
        low: (..., action) least action.
        high: (..., action) greatest action.

    Returns:
        (..., action) actions, in the shape that the bounds broadcast to.

    Example:
        >>> actions = uniform_actions(torch.Generator().manual_seed(0), low=torch.zeros(3, 2), high=torch.ones(2))
        >>> actions.shape, bool((actions <= 1).all())
        (torch.Size([3, 2]), True)
    """
    share = uniform_noise(generator, low, high)
    action = low + share * (high - low)
    return clip(action, low, high)
