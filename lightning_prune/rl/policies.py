"""Policies: a network and the distribution over actions that its outputs describe."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.rl.distributions import Bernoulli, Categorical, Distribution, Gaussian

__all__ = ["POLICIES", "BernoulliPolicy", "CategoricalPolicy", "GaussianPolicy", "Policy"]


class Policy(nn.Module):
    """Give each input a distribution over actions.

    Args:
        network: Given (n, input), returns the (n, outputs) that describe the distributions.
        low: (action,) least action.
        high: (action,) greatest action.
    """

    low: Tensor
    high: Tensor

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    @staticmethod
    def outputs(low: Tensor, high: Tensor) -> int:
        """Return how many outputs the network needs."""
        return len(low)

    @abstractmethod
    def forward(self, inputs: Tensor, low: Tensor, high: Tensor) -> Distribution:
        """Return the distributions over actions.

        Args:
            inputs: (n, input).
            low: (n, action) least action allowed for each.
            high: (n, action) greatest action allowed for each.
        """


class GaussianPolicy(Policy):
    """Normal distributions with a learned mean for each input, and a learned std that is the same for all.

    The network speaks in multiples of half the range between `low` and `high`, from its middle.

    Args:
        network: Given (n, input), returns (n, action) means.
        low: (action,) least action.
        high: (action,) greatest action.
        initial_std: Std at the start, as a multiple of half the range.

    Example:
        >>> policy = GaussianPolicy(nn.Identity(), torch.zeros(1), torch.full((1,), 4.0), initial_std=0.5)
        >>> policy(torch.tensor([[0.5]]), policy.low, policy.high).parameters()
        tensor([[3., 1.]], grad_fn=<CatBackward0>)
    """

    middle: Tensor
    half_range: Tensor

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor, initial_std: float = 1.0) -> None:
        super().__init__(network, low, high)
        self.log_std = nn.Parameter(torch.full_like(low, math.log(initial_std)))
        self.register_buffer("middle", (low + high) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)

    @override
    def forward(self, inputs: Tensor, low: Tensor, high: Tensor) -> Gaussian:
        mean = self.middle + self.half_range * self.network(inputs)
        std = self.half_range * self.log_std.exp()
        return Gaussian(mean, std.expand_as(mean), low, high)


class CategoricalPolicy(Policy):
    """One of the classes from `low` to `high`.

    Args:
        network: Given (n, input), returns (n, classes) logits.
        low: (1,) first class, which is 0.
        high: (1,) last class.

    Raises:
        ValueError: If there is more than one action, or its first class is not 0.
    """

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor) -> None:
        if low.tolist() != [0.0]:
            raise ValueError(
                "A categorical policy has one action, with `low` 0 and `high` the number of the last class."
            )
        super().__init__(network, low, high)

    @staticmethod
    @override
    def outputs(low: Tensor, high: Tensor) -> int:
        return int(high[0]) + 1

    @override
    def forward(self, inputs: Tensor, low: Tensor, high: Tensor) -> Categorical:
        return Categorical(self.network(inputs), low, high)


class BernoulliPolicy(Policy):
    """One yes-or-no decision per entry of the action.

    Args:
        network: Given (n, input), returns (n, action) log-odds of a 1.
        low: (action,) zeros.
        high: (action,) ones.
        initial_probability: Probability of a 1 where the network returns 0, as it nearly does at the start.

    Example:
        >>> policy = BernoulliPolicy(nn.Identity(), torch.zeros(2), torch.ones(2), initial_probability=0.9)
        >>> policy(torch.zeros(1, 2), policy.low, policy.high).parameters()
        tensor([[0.9000, 0.9000]])
    """

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor, initial_probability: float = 0.5) -> None:
        super().__init__(network, low, high)
        self.initial_logit = math.log(initial_probability / (1 - initial_probability))

    @override
    def forward(self, inputs: Tensor, low: Tensor, high: Tensor) -> Bernoulli:
        logits = self.initial_logit + self.network(inputs)
        return Bernoulli(logits, low, high)


POLICIES: dict[str, type[Policy]] = {
    "gaussian": GaussianPolicy,
    "categorical": CategoricalPolicy,
    "bernoulli": BernoulliPolicy,
}
