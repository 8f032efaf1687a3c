"""Multilayer perceptrons that are initialised from a generator of their own.

The global random numbers are not used, so that training beside an agent goes on as without it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["orthogonal_mlp", "uniform_mlp"]


def orthogonal_mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    activation: type[nn.Module] = nn.ReLU,
    output_gain: float = 1.0,
) -> nn.Sequential:
    """Build a multilayer perceptron with orthogonal weights and zero biases.

    Args:
        sizes: Width of the input, of each hidden layer and of the output.
        generator: Source of the weights, on the CPU.
        activation: What follows each hidden layer.
        output_gain: Scale of the last layer's weights. A small one starts a policy near the middle of its range.

    Returns:
        Linear layers with activations between them.

    Example:
        >>> orthogonal_mlp((3, 8, 1), torch.Generator().manual_seed(0))
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=1, bias=True)
        )
    """
    linears = _linears(sizes)
    for linear in linears:
        gain = output_gain if linear is linears[-1] else 2**0.5
        nn.init.orthogonal_(linear.weight, gain, generator=generator)
        nn.init.zeros_(linear.bias)
    return _chain(linears, activation)


def uniform_mlp(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Build a multilayer perceptron as PyTorch initialises one: all numbers within 1 / sqrt(inputs) of zero.

    What such a network returns at first is small beside its inputs, which matters where it judges rewards that are
    small too: a critic with orthogonal weights starts with differences that no reward speaks of.

    Args:
        sizes: Width of the input, of each hidden layer and of the output.
        generator: Source of weights and biases, on the CPU.

    Returns:
        Linear layers with rectified linear units between them.

    Example:
        >>> network = uniform_mlp((4, 8, 1), torch.Generator().manual_seed(0))
        >>> network[0].weight.abs().max() <= 0.5  # 1 / sqrt(4)
        tensor(True)
    """
    linears = _linears(sizes)
    for linear in linears:
        bound = linear.in_features**-0.5
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return _chain(linears, nn.ReLU)


def _linears(sizes: Sequence[int]) -> list[nn.Linear]:
    """Return layers whose parameters are still to be initialised."""
    return [nn.utils.skip_init(nn.Linear, inputs, outputs) for inputs, outputs in pairwise(sizes)]


def _chain(linears: Sequence[nn.Linear], activation: type[nn.Module]) -> nn.Sequential:
    layers = [layer for linear in linears for layer in (linear, activation())]
    return nn.Sequential(*layers[:-1])
