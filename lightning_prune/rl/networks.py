"""Multilayer perceptrons that are initialised from a generator of their own, and steps that train them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradient_step", "mlp"]


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
    *hidden_sizes, output_size = sizes[1:]
    width = sizes[0]
    layers: list[nn.Module] = []
    for hidden_size in hidden_sizes:
        layers.append(_linear(width, hidden_size, 2**0.5, generator))
        layers.append(activation())
        width = hidden_size
    layers.append(_linear(width, output_size, output_gain, generator))
    return nn.Sequential(*layers)


def gradient_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Step along the gradient of the parameters of an optimizer; other parameters of the loss get no gradient.

    Args:
        optimizer: The optimizer.
        loss: The scalar loss.

    Example:
        >>> actor, critic = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> gradient_step(torch.optim.SGD(actor.parameters()), critic(actor(torch.ones(1))).sum())
        >>> actor.weight.grad is None, critic.weight.grad is None
        (False, True)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
