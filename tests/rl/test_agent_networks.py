"""Networks of agents: how they start, and from which random numbers."""

import torch
from torch import nn

from lightning_prune.rl.networks import mlp


def linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def test_weights_keep_lengths_and_biases_are_zero():
    network = mlp((50, 40, 30), torch.Generator().manual_seed(0), output_gain=0.5)
    for layer, gain in zip(linears(network), (2**0.5, 0.5), strict=True):
        product = layer.weight @ layer.weight.T
        torch.testing.assert_close(product, gain**2 * torch.eye(layer.out_features), atol=1e-5, rtol=0)
        assert not layer.bias.any()


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (mlp((5, 7, 2), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for ours, same, different in zip(linears(first), linears(again), linears(other), strict=True):
        assert torch.equal(ours.weight, same.weight)
        assert not torch.equal(ours.weight, different.weight)


def test_activations_stand_between_layers_and_not_after_the_last():
    kinds = [type(layer) for layer in mlp((5, 7, 6, 2), torch.Generator().manual_seed(0), nn.Tanh)]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
