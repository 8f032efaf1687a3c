"""Trust regions of PPO: what keeps a new policy near the one that gathered the data.

Each has a `loss` to minimise and an `adapt` that is called once after all passes over a rollout.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.rl.distributions import Distribution

__all__ = [
    "TRUST_REGIONS",
    "Clip",
    "Correntropy",
    "CorrentropyFirstOrder",
    "CorrentropySecondOrder",
    "KullbackLeibler",
    "Penalty",
    "TrustRegion",
]


class TrustRegion(ABC):
    """Say what a new policy is to minimise, given the one that gathered the data.

    Subclasses with settings take them as keyword arguments that have defaults.
    """

    @abstractmethod
    def loss(self, ratio: Tensor, advantage: Tensor, old: Distribution, new: Distribution) -> Tensor:
        """Return the scalar loss of the new policy.

        Args:
            ratio: (n,) probability of the action under the new policy over that under the old one.
            advantage: (n,) how much better the action was than expected.
            old: The policy that gathered the data, for each row.
            new: The policy that learns.
        """

    def adapt(self, old: Distribution, new: Distribution) -> dict[str, float]:
        """Adjust to how far the policy went, and return figures to log.

        Args:
            old: The policy that gathered the data, for each row.
            new: The policy after all passes.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what changes in training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: What `state_dict` returned.
        """
        return


class Clip(TrustRegion):
    """Give no reward for moving the probability of an action further than a factor of 1 +- `clip_range`.

    Args:
        clip_range: The epsilon of the paper.

    Note:
        Equation 7 of Schulman et al., "Proximal Policy Optimization Algorithms" (2017).

    Example:
        >>> ratio, advantage = torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0])
        >>> Clip(clip_range=0.2).loss(ratio, advantage, None, None)  # -(1.2 - 0.8) / 2
        tensor(-0.2000)
    """

    def __init__(self, clip_range: float = 0.2) -> None:
        self.clip_range = clip_range

    @override
    def loss(self, ratio: Tensor, advantage: Tensor, old: Distribution, new: Distribution) -> Tensor:
        clipped_ratio = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        gain = torch.minimum(ratio * advantage, clipped_ratio * advantage)
        return -gain.mean()


class Penalty(TrustRegion):
    """Subtract a multiple of the distance between the policies, a subclass says which, from the expected advantage.

    Args:
        coefficient: How much the distance weighs.
        target: The mean distance wanted after an update. Where it is less than the target by a factor of more than
            1.5 the coefficient is halved, where it is more by such a factor the coefficient is doubled. None keeps the
            coefficient.
    """

    def __init__(self, coefficient: float, target: float | None) -> None:
        self.coefficient = coefficient
        self.target = target

    @abstractmethod
    def distance(self, old: Distribution, new: Distribution) -> Tensor:
        """Return the (n,) distance of the policies, 0 where they are the same.

        Args:
            old: The policy that gathered the data, for each row.
            new: The policy that learns.
        """

    @override
    def loss(self, ratio: Tensor, advantage: Tensor, old: Distribution, new: Distribution) -> Tensor:
        gain = (ratio * advantage).mean()
        penalty = self.coefficient * self.distance(old, new).mean()
        return -gain + penalty

    @override
    def adapt(self, old: Distribution, new: Distribution) -> dict[str, float]:
        distance = float(self.distance(old, new).mean())
        if self.target is not None:
            self._move_towards(self.target, distance)
        return {"distance": distance, "coefficient": self.coefficient}

    def _move_towards(self, target: float, distance: float) -> None:
        if distance < target / 1.5:
            self.coefficient /= 2
        elif distance > target * 1.5:
            self.coefficient *= 2

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]


class KullbackLeibler(Penalty):
    """Penalise the divergence KL(old || new).

    Args:
        coefficient: The first beta.
        target: The divergence wanted, in nats; None keeps beta.

    Note:
        Equation 8 of Schulman et al. (2017), with their factors of 1.5 and 2.

    Example:
        >>> from lightning_prune.rl.distributions import Gaussian
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> old, new = Gaussian(zero, one, zero, one), Gaussian(one, one / 2, zero, one)
        >>> KullbackLeibler().distance(old, new), KullbackLeibler().distance(new, old)  # not symmetric
        (tensor([2.8069]), tensor([0.8181]))
    """

    def __init__(self, coefficient: float = 1.0, target: float | None = 0.01) -> None:
        super().__init__(coefficient, target)

    @override
    def distance(self, old: Distribution, new: Distribution) -> Tensor:
        return old.kl(new)


class Correntropy(Penalty):
    """Penalise the squared correntropy induced metric between the parameters of the policies.

    With the kernel k(d) = exp(-d^2 / (2 sigma^2)) / (sqrt(2 pi) sigma) of each difference d of two parameters (mean and
    std, or probabilities of classes), the distance is the mean of k(0) - k(d): symmetric, 0 where the policies are the
    same, like a square near it, and bounded far away.

    Args:
        coefficient: The alpha of the paper.
        sigma: Width of the kernel, in terms of the parameters.
        target: The distance wanted, by which alpha is adapted as beta is with `KullbackLeibler`; None keeps alpha.

    Note:
        Guo et al., "Proximal Policy Optimization with Correntropy Induced Metric" (2021). Interpretation: their code
        adds k(d) itself, which pushes the policies apart; the metric is k(0) - k(d). Their expansions lack sigma, and
        the first one the factor of the kernel as well; here all three forms share both, so their alpha of 5 with the
        first-order form is 5 sqrt(2 pi) = 12.5 here. Adapting alpha is an addition.

    Example:
        >>> from lightning_prune.rl.distributions import Gaussian
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> old, new = Gaussian(zero, one, zero, one), Gaussian(one, one, zero, one)
        >>> Correntropy(sigma=1.0).distance(old, new)  # (1 - exp(-1 / 2)) / sqrt(2 pi) for the mean, 0 for the std
        tensor([0.0785])
    """

    def __init__(self, coefficient: float = 5.0, sigma: float = 1.0, target: float | None = None) -> None:
        if sigma <= 0:
            raise ValueError(f"`sigma` is the width of a kernel and must be above 0; got {sigma}.")
        super().__init__(coefficient, target)
        self.sigma = sigma

    @override
    def distance(self, old: Distribution, new: Distribution) -> Tensor:
        difference = old.parameters() - new.parameters()
        exponent = difference.square() / (2 * self.sigma**2)
        return self.rise(exponent).mean(-1) / (math.sqrt(2 * math.pi) * self.sigma)

    def rise(self, exponent: Tensor) -> Tensor:
        """Return 1 - exp(-exponent), or an expansion of it.

        Args:
            exponent: d^2 / (2 sigma^2), of any shape.
        """
        return -torch.expm1(-exponent)


class CorrentropyFirstOrder(Correntropy):
    """Penalise the first-order expansion of the metric, a square: d^2 / (2 sigma^2) times k(0).

    Args:
        coefficient: As for `Correntropy`, and so are the others.
        sigma: Width of the kernel.
        target: The distance wanted.

    Example:
        >>> CorrentropyFirstOrder().rise(torch.tensor(0.1)), Correntropy().rise(torch.tensor(0.1))
        (tensor(0.1000), tensor(0.0952))
    """

    @override
    def rise(self, exponent: Tensor) -> Tensor:
        return exponent


class CorrentropySecondOrder(Correntropy):
    """Penalise the second-order expansion of the metric: x - x^2 / 2 times k(0), with x = d^2 / (2 sigma^2).

    From its maximum at x = 1 on the parabola falls, and would push far policies apart; there it is kept at its maximum,
    as the metric is (an interpretation).

    Args:
        coefficient: As for `Correntropy`, and so are the others.
        sigma: Width of the kernel.
        target: The distance wanted.

    Example:
        >>> CorrentropySecondOrder().rise(torch.tensor([0.1, 1.0, 5.0]))
        tensor([0.0950, 0.5000, 0.5000])
    """

    @override
    def rise(self, exponent: Tensor) -> Tensor:
        near = exponent.clamp(max=1.0)
        return near - near.square() / 2


TRUST_REGIONS: dict[str, type[TrustRegion]] = {
    "clip": Clip,
    "kl": KullbackLeibler,
    "cim": Correntropy,
    "cim-1": CorrentropyFirstOrder,
    "cim-2": CorrentropySecondOrder,
}
