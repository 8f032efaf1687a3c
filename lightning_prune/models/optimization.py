"""How a classifier's weights are trained: optimizer, weight decay, and the learning rate from epoch to epoch."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_prune.importing import imported

SCHEDULES = ("cosine", "steps", "constant")
OPTIMIZER_DEFAULTS = {"SGD": {"momentum": 0.9}}


@dataclass(frozen=True)
class Optimization:
    """Say how weights are trained.

    Weight decay applies to the weights of convolutions and linear layers; biases and the scales and shifts of
    normalisation layers (all parameters of one dimension) are spared.

    Args:
        lr: Learning rate, above 0.
        weight_decay: Weight decay, at least 0.
        optimizer: Name of a class of ``torch.optim``, such as "SGD" or "AdamW", or the dotted path of another.
        optimizer_args: Further arguments of the optimizer; SGD has momentum 0.9 unless they say otherwise.
        schedule: How the learning rate falls from epoch to epoch: "cosine" to 0 along half a cosine, "steps" by a
            factor of 10 at each milestone, "constant" not at all.
        warmup_epochs: Number of epochs at the start in which the learning rate rises in equal steps, at least 0.
        milestones: Rising epochs of the schedule "steps".
        restarts: Rising epochs at which the schedule "cosine" starts anew from the full learning rate; it then falls
            towards 0 until the next one (Loshchilov and Hutter, "SGDR", 2017).

    Raises:
        ValueError: If a setting is outside its range, or if the optimizer does not take them.

    Example:
        >>> from lightning_prune.models import Optimization
        >>> settings = Optimization(lr=0.1, warmup_epochs=1)
        >>> [settings.factor(epoch, max_epochs=3) for epoch in range(4)]
        [0.5, 1.0, 0.5, 0.0]
        >>> [round(Optimization(restarts=[2]).factor(epoch, max_epochs=4), 3) for epoch in range(4)]
        [1.0, 0.5, 1.0, 0.5]
    """

    lr: float = 0.1
    weight_decay: float = 5e-4
    optimizer: str = "SGD"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup_epochs: int = 0
    milestones: list[int] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} would not train: set a learning rate above 0.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} is negative: set it to 0 or above.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is negative: set it to 0 for none.")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule='steps' needs milestones: list the epochs at which the learning rate falls.")
        if self.restarts and self.schedule != "cosine":
            raise ValueError(f"schedule={self.schedule!r} has no restarts: choose 'cosine', or set no restarts.")
        if self.restarts and self.restarts[0] <= self.warmup_epochs:
            raise ValueError(f"restarts={self.restarts} begin within the warm-up: list epochs after warmup_epochs.")
        _check_rising("milestones", self.milestones)
        _check_rising("restarts", self.restarts)
        # Made once for nothing, so that arguments that the optimizer refuses are refused before any data is loaded.
        self.make_optimizer(nn.Linear(1, 1))

    def make_optimizer(self, module: nn.Module) -> Optimizer:
        """Return the optimizer of a module's parameters, frozen ones included.

        Args:
            module: The module.

        Returns:
            The optimizer, with one group of parameters that decay and one of those that are spared.
        """
        decaying = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        spared = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = []
        if decaying:
            groups.append({"params": decaying, "weight_decay": self.weight_decay})
        if spared:
            groups.append({"params": spared, "weight_decay": 0.0})
        arguments = OPTIMIZER_DEFAULTS.get(self.optimizer, {}) | self.optimizer_args
        optimizer_class = _find_optimizer(self.optimizer)
        try:
            return optimizer_class(groups, lr=self.lr, **arguments)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"optimizer={self.optimizer!r} refuses lr={self.lr} and optimizer_args={arguments} ({error}): correct "
                "them."
            ) from error

    def make_schedule(self, optimizer: Optimizer, max_epochs: int | None) -> LRScheduler:
        """Return the schedule of the learning rate, to be stepped once per epoch.

        Args:
            optimizer: The optimizer.
            max_epochs: Number of epochs of the training, if known; "cosine" needs it.

        Raises:
            ValueError: If the schedule is "cosine" and the number of epochs is not known.
        """
        if self.schedule == "cosine" and (max_epochs is None or max_epochs < 1):
            raise ValueError("schedule='cosine' must know where it ends: set Trainer(max_epochs=...).")
        return LambdaLR(optimizer, lambda epoch: self.factor(epoch, max_epochs or 0))

    def factor(self, epoch: int, max_epochs: int) -> float:
        """Return what the learning rate is multiplied with in an epoch.

        Args:
            epoch: The epoch, from 0.
            max_epochs: Number of epochs of the training; only "cosine" needs it.

        Returns:
            The factor, in [0, 1].
        """
        if epoch < self.warmup_epochs:
            return (epoch + 1) / (self.warmup_epochs + 1)
        if self.schedule == "cosine":
            restarts_before = bisect_right(self.restarts, epoch)
            start = [self.warmup_epochs, *self.restarts][restarts_before]
            end = [*self.restarts, max_epochs][restarts_before]
            progress = (epoch - start) / max(1, end - start)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.schedule == "steps":
            milestones_before = sum(epoch >= milestone for milestone in self.milestones)
            return 0.1**milestones_before
        return 1.0


def _check_rising(name: str, epochs: list[int]) -> None:
    previous = 0
    for epoch in epochs:
        if epoch <= previous:
            raise ValueError(f"{name}={epochs} do not rise: list epochs above 0, each later than the last.")
        previous = epoch


def _find_optimizer(name: str) -> type[Optimizer]:
    try:
        found = imported(name if "." in name else f"torch.optim.{name}")
    except ImportError as error:
        raise ValueError(
            f"optimizer={name!r} cannot be found ({error}): give the name of a class of torch.optim, such as 'SGD' or "
            "'AdamW', or the dotted path of another."
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise ValueError(f"optimizer={name!r} is no optimizer: give a subclass of torch.optim.Optimizer.")
    return found
