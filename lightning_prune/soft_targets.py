"""Soft targets: learning from what another network says of all classes (Hinton et al. 2015)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

__all__ = ["SoftTargets"]


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Say how much a network learns from a teacher, and how soft the teacher's answers are made.

    Args:
        temperature: What the logits of both networks are divided by before they are compared, above 0.
        share: Share of the teacher in the loss, in (0, 1]; the rest is that of the labels.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import torch
        >>> said, expected = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> SoftTargets(temperature=4.0).divergence(said, expected)  # 16 * 0.1109...
        tensor(1.7751)
    """

    without: ClassVar[str] = "leave the setting out for no teacher"

    temperature: float = 4.0
    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0: 4 is usual.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is outside (0, 1]: {self.without}.")

    def divergence(self, said: Tensor, expected: Tensor) -> Tensor:
        """Return how far a network is from its teacher: a single number, at least 0.

        The divergence of the softened classes, times the square of the temperature: the gradients of soft targets fall
        with it (section 2 of the paper).

        Args:
            said: (n, classes) logits of the network.
            expected: (n, classes) logits of the teacher.
        """
        log_said = F.log_softmax(said / self.temperature, dim=1)
        log_expected = F.log_softmax(expected / self.temperature, dim=1)
        divergence = F.kl_div(log_said, log_expected, reduction="batchmean", log_target=True)
        return self.temperature**2 * divergence
