"""Distributions over actions, which policies sample from.

Bounds belong to a distribution, so that log-probabilities are those of actions as they were executed. All distributions
have the same methods: `sample`, `mode`, `log_prob`, `entropy`, `parameters`, `kl`, and indexing along the batch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from lightning_prune.rl.rows import Rows
from lightning_prune.rl.sampling import clip, normal_noise, uniform_noise

__all__ = ["Bernoulli", "Categorical", "Distribution", "Gaussian"]

_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
_ENTROPY_OF_STANDARD_NORMAL = 0.5 * math.log(2 * math.pi * math.e)
_FORBIDDEN = -1e9  # the logit of a class out of bounds: no chance, and yet finite where it is multiplied by 0


class Distribution(Rows, ABC):
    """A batch of distributions over actions, one per row."""

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw an action for each row: (n, action), within the bounds."""

    @abstractmethod
    def mode(self) -> Tensor:
        """Return the most probable action of each row: (n, action), within the bounds."""

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """Return the (n,) log-probability, or log-density, of (n, action) actions as they were executed."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Return the (n,) entropy in nats."""

    @abstractmethod
    def parameters(self) -> Tensor:
        """Return what describes the distribution, (n, parameters): mean and std, or probabilities."""

    @abstractmethod
    def kl(self, other: Self) -> Tensor:
        """Return the (n,) Kullback-Leibler divergence from this to the other one, KL(this || other)."""


@dataclass
class Gaussian(Distribution):
    """Independent normal distributions; what is drawn outside of the bounds is executed at the bound.

    An action at a bound therefore has the probability of everything beyond it, and one that is fixed (``low == high``)
    has probability 1. Entropy, parameters and divergence are those of the normal distribution before clipping.

    Args:
        mean: (n, action).
        std: (n, action), above 0.
        low: (n, action) least action.
        high: (n, action) greatest action.

    Note:
        The log-probability at a bound is that of Fujita and Maeda, "Clipped Action Policy Gradient" (ICML 2018): the
        gradient is unbiased and varies less than that of the density of the action before clipping.

    Example:
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> policy = Gaussian(mean=zero, std=one, low=zero, high=one)
        >>> policy.log_prob(zero).exp(), policy.mode()
        (tensor([0.5000]), tensor([[0.]]))
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @override
    def sample(self, generator: torch.Generator) -> Tensor:
        noise = normal_noise(generator, self.mean, self.low, self.high)
        unclipped = self.mean + self.std * noise
        return clip(unclipped, self.low, self.high)

    @override
    def mode(self) -> Tensor:
        return clip(self.mean, self.low, self.high)

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        deviation = (action - self.mean) / self.std
        log_density = -0.5 * deviation.square() - self.std.log() - _HALF_LOG_2_PI
        at_low = action <= self.low
        at_high = action >= self.high
        # At a bound counts the probability of all that lies beyond it.
        log_tail = torch.special.log_ndtr(torch.where(at_low, deviation, -deviation))
        log_prob = torch.where(at_low | at_high, log_tail, log_density)
        fixed = self.low >= self.high
        return log_prob.masked_fill(fixed, 0.0).sum(-1)

    @override
    def entropy(self) -> Tensor:
        entropies = self.std.log() + _ENTROPY_OF_STANDARD_NORMAL
        return entropies.sum(-1)

    @override
    def parameters(self) -> Tensor:
        return torch.cat([self.mean, self.std], dim=-1)

    @override
    def kl(self, other: Self) -> Tensor:
        shift = (self.mean - other.mean) / other.std
        squared_shift = shift.square()
        std_ratio = self.std / other.std
        variance_ratio = std_ratio.square()
        terms = variance_ratio + squared_shift - 1 - variance_ratio.log()
        return 0.5 * terms.sum(-1)


@dataclass
class Categorical(Distribution):
    """One of several classes; the action is the number of the class.

    Args:
        logits: (n, classes) unnormalised log-probabilities.
        low: (n, 1) first class allowed.
        high: (n, 1) last class allowed.

    Example:
        >>> policy = Categorical(torch.zeros(1, 4), low=torch.tensor([[0.0]]), high=torch.tensor([[1.0]]))
        >>> policy.parameters()
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """

    logits: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        classes = torch.arange(self.logits.shape[-1], device=self.logits.device)
        forbidden = (classes < self.low) | (classes > self.high)
        allowed_logits = self.logits.masked_fill(forbidden, _FORBIDDEN)
        self.logits = allowed_logits.log_softmax(-1)

    @override
    def sample(self, generator: torch.Generator) -> Tensor:
        cumulative = self.parameters().cumsum(-1)  # (n, classes)
        total = cumulative[..., -1:]  # (n, 1)
        # Scaled by what rounding makes of the sum of all, so that none lies beyond the last class with a chance.
        threshold = uniform_noise(generator, total) * total
        classes_below = cumulative <= threshold
        return classes_below.sum(-1, keepdim=True).float()

    @override
    def mode(self) -> Tensor:
        return self.logits.argmax(-1, keepdim=True).float()

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action.long()).squeeze(-1)

    @override
    def entropy(self) -> Tensor:
        terms = self.parameters() * self.logits
        return -terms.sum(-1)

    @override
    def parameters(self) -> Tensor:
        return self.logits.exp()

    @override
    def kl(self, other: Self) -> Tensor:
        terms = self.parameters() * (self.logits - other.logits)
        return terms.sum(-1)


@dataclass
class Bernoulli(Distribution):
    """One independent decision per entry, 1 for yes and 0 for no; at least one entry is 1.

    Where all entries would be 0, the most probable one is made 1. The log-probability counts that in, so that it is
    the true one of what was executed. Entries that the bounds decide have probability 1.

    Args:
        logits: (n, action) log-odds of a 1 in each entry.
        low: (n, action) 1 for entries that must be 1, else 0.
        high: (n, action) 0 for entries that must be 0, else 1.

    Example:
        >>> policy = Bernoulli(torch.zeros(1, 2), low=torch.zeros(1, 2), high=torch.ones(1, 2))
        >>> actions = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> policy.log_prob(actions).exp()  # the first entry is made 1 where both would be 0
        tensor([0.2500, 0.5000, 0.2500])
    """

    logits: Tensor
    low: Tensor
    high: Tensor

    @override
    def sample(self, generator: torch.Generator) -> Tensor:
        noise = uniform_noise(generator, self.logits, self.low, self.high)
        action = noise < self.logits.sigmoid()
        return self._not_all_zero(action.float())

    @override
    def mode(self) -> Tensor:
        action = self.logits >= 0
        return self._not_all_zero(action.float())

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        log_one = F.logsigmoid(self.logits)
        log_zero = F.logsigmoid(-self.logits)
        of_entries = torch.where(action > 0.5, log_one, log_zero)
        of_action = self._sum_over_undecided(of_entries)
        of_all_zero = self._sum_over_undecided(log_zero).expand_as(of_action)
        of_either = torch.logaddexp(of_action, of_all_zero)
        replaces_all_zero = self._replaces_all_zero(action)
        return torch.where(replaces_all_zero, of_either, of_action)

    @override
    def entropy(self) -> Tensor:
        one = self.logits.sigmoid()
        terms_of_one = -one * F.logsigmoid(self.logits)
        terms_of_zero = (1 - one) * F.logsigmoid(-self.logits)
        return self._sum_over_undecided(terms_of_one - terms_of_zero)

    @override
    def parameters(self) -> Tensor:
        return self.logits.sigmoid()

    @override
    def kl(self, other: Self) -> Tensor:
        one = self.logits.sigmoid()
        log_ratio_of_one = F.logsigmoid(self.logits) - F.logsigmoid(other.logits)
        terms_of_one = one * log_ratio_of_one
        log_ratio_of_zero = F.logsigmoid(-self.logits) - F.logsigmoid(-other.logits)
        terms_of_zero = (1 - one) * log_ratio_of_zero
        return self._sum_over_undecided(terms_of_one + terms_of_zero)

    @property
    def _undecided(self) -> Tensor:
        """The (n, action) entries that the bounds do not decide."""
        return self.low < self.high

    def _sum_over_undecided(self, terms: Tensor) -> Tensor:
        undecided_terms = terms.masked_fill(~self._undecided, 0.0)
        return undecided_terms.sum(-1)

    def _replaces_all_zero(self, action: Tensor) -> Tensor:
        """Tell for each row whether the action is also executed where all entries are drawn as 0: (n,)."""
        replacement = self._not_all_zero(torch.zeros_like(action))
        is_replacement = (action == replacement).all(-1)
        none_must_be_one = (self.low < 0.5).all(-1)
        return is_replacement & none_must_be_one & self._undecided.any(-1)

    def _not_all_zero(self, action: Tensor) -> Tensor:
        """Clip actions, and make the most probable entry 1 where all are 0."""
        action = clip(action, self.low, self.high)
        candidates = self.logits.masked_fill(~self._undecided, -math.inf)
        most_probable = candidates.argmax(-1, keepdim=True)
        index = most_probable.expand_as(action[..., :1])
        single_one = torch.zeros_like(action).scatter(-1, index, 1.0)
        replacement = torch.minimum(single_one, self.high)
        any_one = (action > 0.5).any(-1, keepdim=True)
        return torch.where(any_one, action, replacement)
