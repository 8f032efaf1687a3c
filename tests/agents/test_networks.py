"""Networks of agents: how they start, and from which random numbers."""

import pytest
import torch
from torch import nn

from lightning_prune.agents import SAC
from lightning_prune.agents.networks import orthogonal_mlp, uniform_mlp


def linears(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def assert_as_pytorch(network: nn.Module) -> None:
    """The bound is that of PyTorch's own layers, and the draws are spread evenly over what is within it."""
    for layer in linears(network):
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
        if layer.weight.numel() >= 10_000:
            shares = torch.histc(layer.weight.detach(), 10, -bound, bound) / layer.weight.numel()
            torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_uniform_weights_and_biases_have_the_bounds_of_pytorch():
    assert_as_pytorch(uniform_mlp((100, 200, 300, 2), torch.Generator().manual_seed(0)))


def test_sac_starts_actor_critics_and_targets_as_pytorch_would():
    agent = SAC(3, 2, seed=0)
    for network in (agent.actor, *agent.critics, *agent.targets):
        assert_as_pytorch(network)
    first, second = agent.critics
    assert not torch.equal(first[0].weight, second[0].weight)  # two opinions, else their minimum is one of one critic


def test_orthogonal_weights_keep_lengths_and_biases_are_zero():
    network = orthogonal_mlp((50, 40, 30), torch.Generator().manual_seed(0), output_gain=0.5)
    for layer, gain in zip(linears(network), (2**0.5, 0.5), strict=True):
        product = layer.weight @ layer.weight.T
        torch.testing.assert_close(product, gain**2 * torch.eye(layer.out_features), atol=1e-5, rtol=0)
        assert not layer.bias.any()


@pytest.mark.parametrize("build", [orthogonal_mlp, uniform_mlp])
def test_weights_come_from_the_generator_alone(build):
    before = torch.get_rng_state()
    first, again, other = (build((5, 7, 2), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for ours, same, different in zip(linears(first), linears(again), linears(other), strict=True):
        assert torch.equal(ours.weight, same.weight)
        assert not torch.equal(ours.weight, different.weight)


@pytest.mark.parametrize("build", [orthogonal_mlp, uniform_mlp])
def test_activations_stand_between_layers_and_not_after_the_last(build):
    kinds = [type(layer) for layer in build((5, 7, 6, 2), torch.Generator().manual_seed(0))]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
