"""Multilayer perceptrons that are initialised from a generator of their own."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["mlp"]


def mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    activation: type[nn.Module] = nn.ReLU,
    output_gain: float = 1.0,
) -> nn.Sequential:
    """Build a multilayer perceptron with orthogonal weights and zero biases.

    The global random numbers are not used, so that training beside it goes on as without it.

    Args:
        sizes: Width of the input, of each hidden layer and of the output.
        generator: Source of the weights, on the CPU.
        activation: What follows each hidden layer.
        output_gain: Scale of the last layer's weights. A small one starts a policy near the middle of its range.

    Returns:
        Linear layers with activations between them.

    Example:
        >>> mlp((3, 8, 1), torch.Generator().manual_seed(0))
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=1, bias=True)
        )
    """
    layers: list[nn.Module] = []
    for position, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = position == len(sizes) - 2
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.orthogonal_(linear.weight, output_gain if last else 2**0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, activation()]
    return nn.Sequential(*layers)
