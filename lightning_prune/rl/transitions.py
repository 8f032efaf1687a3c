"""Transitions: one step in the environment, or one step in each of several, and how they are stored as rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "Transition"]


@dataclass(frozen=True)
class Transition:
    """Hold one step in each of n environments; numbers, lists, arrays and tensors are taken.

    Args:
        observation: (n, observation) what the agent saw; (observation,) is one environment.
        action: (n, action) the action as it was executed, after clipping to the bounds.
        reward: (n,) what it earned.
        next_observation: (n, observation) what came of it; also at the end of an episode, not what follows a reset.
        terminated: (n,) whether the episode ended there, so that nothing more can be earned.
        truncated: (n,) whether the episode was merely cut off there, so that more could still have been earned.
        low: (n, action) least action allowed in this step; None is that of the agent. So are the next three.
        high: (n, action) greatest action allowed in this step.
        next_low: (n, action) least action allowed in the next step.
        next_high: (n, action) greatest action allowed in the next step.
        epoch: (n,) the epoch of training in which it was seen, which says how the environment behaved then.

    Example:
        >>> step = Transition([0.1, 0.2], action=[0.5], reward=1.0, next_observation=[0.3, 0.4], terminated=True)
        >>> step.truncated, step.epoch
        (False, 0)
    """

    observation: Any
    action: Any
    reward: Any
    next_observation: Any
    terminated: Any
    truncated: Any = False
    low: Any = None
    high: Any = None
    next_low: Any = None
    next_high: Any = None
    epoch: Any = 0


class Layout:
    """Know which columns of a matrix hold which field of a transition.

    With one row for each transition, storing and sampling are one operation each.

    Args:
        observation_size: Numbers in an observation.
        low: (action,) least action; stands in for bounds that a transition does not give.
        high: (action,) greatest action.

    Example:
        >>> layout = Layout(observation_size=2, low=torch.zeros(1), high=torch.ones(1))
        >>> rows = layout.pack(Transition([0.1, 0.2], [0.5], 1.0, [0.3, 0.4], terminated=True))
        >>> rows.shape, layout.unpack(rows).reward
        (torch.Size([1, 13]), tensor([1.]))
    """

    def __init__(self, observation_size: int, low: Tensor, high: Tensor) -> None:
        self.low = low
        self.high = high
        self.action_size = len(low)
        self.sizes = {
            "observation": observation_size,
            "action": self.action_size,
            "reward": 1,
            "next_observation": observation_size,
            "terminated": 1,
            "truncated": 1,
            "low": self.action_size,
            "high": self.action_size,
            "next_low": self.action_size,
            "next_high": self.action_size,
            "epoch": 1,
        }
        self.width = sum(self.sizes.values())
        self._defaults = {"low": low, "high": high, "next_low": low, "next_high": high}

    def pack(self, transition: Transition) -> Tensor:
        """Return the transition as (n, width) rows.

        Args:
            transition: The step, in one environment or in n.

        Raises:
            ValueError: If a field does not hold as many numbers as it should, or one that is not finite.
        """
        actions = torch.as_tensor(transition.action).reshape(-1, self.action_size)
        n = len(actions)
        columns = [self._columns(field, self._value(transition, field), n) for field in self.sizes]
        rows = torch.cat(columns, dim=1)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"A transition has a number that is not finite; its reward is {transition.reward}.")
        return rows

    def unpack(self, rows: Tensor) -> Transition:
        """Return the transitions of (..., width) rows; rewards, flags and epochs have shape (...).

        Args:
            rows: Rows made by `pack`.
        """
        columns = rows.split(list(self.sizes.values()), dim=-1)
        fields = dict(zip(self.sizes, columns, strict=True))
        for field in ("reward", "terminated", "truncated", "epoch"):
            fields[field] = fields[field].squeeze(-1)
        return Transition(**fields)

    def _value(self, transition: Transition, field: str) -> Any:
        """Return what a transition holds in a field, or the bound that stands in for it."""
        value = getattr(transition, field)
        return self._defaults[field] if value is None else value

    def _columns(self, field: str, value: Any, n: int) -> Tensor:
        """Return a field as (n, size); what is given once holds for all n environments."""
        size = self.sizes[field]
        numbers = torch.as_tensor(value, dtype=torch.float32)
        if numbers.numel() not in (size, n * size):
            raise ValueError(f"{field!r} of a transition has shape {tuple(numbers.shape)}; ({n}, {size}) is needed.")
        return numbers.to(self.low.device).reshape(-1, size).expand(n, size)
