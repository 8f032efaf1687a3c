"""What policies draw actions from.

Bounds are part of a distribution, so that log-probabilities are those of actions as they were executed. All
distributions have the same methods: `sample`, `mode`, `log_prob`, `entropy`, `parameters`, `kl`, and indexing along the
batch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

__all__ = ["Bernoulli", "Categorical", "Distribution", "Gaussian"]

_FORBIDDEN = -1e9  # the logit of a class out of bounds: no chance, and yet finite where it is multiplied by 0


class Distribution(ABC):
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

    def __getitem__(self, rows: Any) -> Self:
        """Return the distributions of some rows."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))  # type: ignore[arg-type]


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
        gradient stays unbiased and varies less than that of the density of the action before clipping.

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
        shape = torch.broadcast_shapes(self.mean.shape, self.low.shape, self.high.shape)
        noise = torch.randn(shape, generator=generator).to(self.mean.device)
        return self._clip(self.mean + self.std * noise)

    @override
    def mode(self) -> Tensor:
        return self._clip(self.mean)

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        standard = (action - self.mean) / self.std
        inside = -0.5 * standard.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        beyond = torch.special.log_ndtr(torch.where(action <= self.low, standard, -standard))
        clipped = (action <= self.low) | (action >= self.high)
        fixed = self.low >= self.high
        return torch.where(clipped, beyond, inside).masked_fill(fixed, 0.0).sum(-1)

    @override
    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    @override
    def parameters(self) -> Tensor:
        return torch.cat([self.mean, self.std], dim=-1)

    @override
    def kl(self, other: Self) -> Tensor:
        shift = ((self.mean - other.mean) / other.std).square()
        ratio = (self.std / other.std).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)

    def _clip(self, action: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(action, self.low), self.high)


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
        self.logits = self.logits.masked_fill(forbidden, _FORBIDDEN).log_softmax(-1)

    @override
    def sample(self, generator: torch.Generator) -> Tensor:
        cumulative = self.parameters().cumsum(-1)
        share = torch.rand((*cumulative.shape[:-1], 1), generator=generator).to(cumulative.device)
        # Scaled by what rounding makes of the sum of all, so that no share lies beyond the last class with a chance.
        return (cumulative <= share * cumulative[..., -1:]).sum(-1, keepdim=True).float()

    @override
    def mode(self) -> Tensor:
        return self.logits.argmax(-1, keepdim=True).float()

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.gather(-1, action.long()).squeeze(-1)

    @override
    def entropy(self) -> Tensor:
        return -(self.parameters() * self.logits).sum(-1)

    @override
    def parameters(self) -> Tensor:
        return self.logits.exp()

    @override
    def kl(self, other: Self) -> Tensor:
        return (self.parameters() * (self.logits - other.logits)).sum(-1)


@dataclass
class Bernoulli(Distribution):
    """One independent decision per entry, 1 is keep and 0 is remove; at least one entry is kept.

    Where nothing would be kept, the most probable entry is. The log-probability counts that in, so that it is the true
    one of what was executed. Entries that the bounds decide have probability 1.

    Args:
        logits: (n, action) log-odds of keeping each entry.
        low: (n, action) 1 for entries that must stay, else 0.
        high: (n, action) 0 for entries that must go, else 1.

    Example:
        >>> policy = Bernoulli(torch.zeros(1, 2), low=torch.zeros(1, 2), high=torch.ones(1, 2))
        >>> actions = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> policy.log_prob(actions).exp()  # the first entry is kept in place of none
        tensor([0.2500, 0.5000, 0.2500])
    """

    logits: Tensor
    low: Tensor
    high: Tensor

    @override
    def sample(self, generator: torch.Generator) -> Tensor:
        shape = torch.broadcast_shapes(self.logits.shape, self.low.shape, self.high.shape)
        share = torch.rand(shape, generator=generator).to(self.logits.device)
        return self._keep_one((share < self.logits.sigmoid()).float())

    @override
    def mode(self) -> Tensor:
        return self._keep_one((self.logits >= 0).float())

    @override
    def log_prob(self, action: Tensor) -> Tensor:
        keep, remove = F.logsigmoid(self.logits), F.logsigmoid(-self.logits)
        chosen = torch.where(action > 0.5, keep, remove).masked_fill(~self._free, 0.0).sum(-1)
        none = remove.masked_fill(~self._free, 0.0).sum(-1).expand_as(chosen)
        stands_for_none = (action == self._keep_one(torch.zeros_like(action))).all(-1) & self._free.any(-1)
        stands_for_none &= (self.low < 0.5).all(-1)  # else none is never drawn
        return torch.where(stands_for_none, torch.logaddexp(chosen, none), chosen)

    @override
    def entropy(self) -> Tensor:
        keep = self.logits.sigmoid()
        each = -keep * F.logsigmoid(self.logits) - (1 - keep) * F.logsigmoid(-self.logits)
        return each.masked_fill(~self._free, 0.0).sum(-1)

    @override
    def parameters(self) -> Tensor:
        return self.logits.sigmoid()

    @override
    def kl(self, other: Self) -> Tensor:
        keep = self.logits.sigmoid()
        each = keep * (F.logsigmoid(self.logits) - F.logsigmoid(other.logits))
        each = each + (1 - keep) * (F.logsigmoid(-self.logits) - F.logsigmoid(-other.logits))
        return each.masked_fill(~self._free, 0.0).sum(-1)

    @property
    def _free(self) -> Tensor:
        return self.low < self.high

    def _keep_one(self, action: Tensor) -> Tensor:
        action = torch.minimum(torch.maximum(action, self.low), self.high)
        likeliest = self.logits.masked_fill(~self._free, float("-inf")).argmax(-1, keepdim=True)
        kept = torch.zeros_like(action).scatter(-1, likeliest.expand_as(action[..., :1]), 1.0)
        return torch.where((action > 0.5).any(-1, keepdim=True), action, torch.minimum(kept, self.high))
