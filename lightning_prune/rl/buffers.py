"""Buffers of transitions: a replay buffer for agents that learn off policy, a rollout buffer for those on policy."""

from typing import Any

import torch
from torch import Tensor

from lightning_prune.rl.transitions import Layout, Transition

__all__ = ["ReplayBuffer", "RolloutBuffer"]


class ReplayBuffer:
    """Keep the last `buffer_size` transitions and sample from them.

    Args:
        layout: How a transition becomes a row.
        buffer_size: Number of transitions kept; after that the oldest are overwritten.

    Example:
        >>> layout = Layout(observation_size=1, low=torch.zeros(1), high=torch.ones(1))
        >>> buffer = ReplayBuffer(layout, buffer_size=2)
        >>> for reward in (1.0, 2.0, 3.0):
        ...     buffer.add(Transition([0.0], [0.5], reward, [0.0], terminated=True))
        >>> len(buffer), buffer.count
        (2, 3)
        >>> sorted(set(buffer.sample(32, torch.Generator().manual_seed(0)).reward.tolist()))
        [2.0, 3.0]
    """

    def __init__(self, layout: Layout, buffer_size: int) -> None:
        self.layout = layout
        self.buffer_size = buffer_size
        self.count = 0  # transitions ever added
        self._rows = torch.zeros(buffer_size, layout.width, device=layout.low.device)

    def __len__(self) -> int:
        """Return the number of transitions kept."""
        return min(self.count, self.buffer_size)

    def add(self, transition: Transition) -> None:
        """Store a step, in one environment or in several.

        Args:
            transition: The step.
        """
        rows = self.layout.pack(transition)
        end = self.count + len(rows)
        indices = torch.arange(self.count, end, device=rows.device) % self.buffer_size
        self._rows[indices] = rows
        self.count = end

    def sample(self, batch_size: int, generator: torch.Generator) -> Transition:
        """Sample transitions, each with the same probability and with replacement.

        Args:
            batch_size: Number of transitions.
            generator: Source of random numbers, on the CPU.
        """
        indices = torch.randint(len(self), (batch_size,), generator=generator)
        rows = self._rows[indices.to(self._rows.device)]
        return self.layout.unpack(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"rows": self._rows[: len(self)], "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it comes from a buffer of another size.
        """
        rows = state["rows"]
        count = state["count"]
        expected_shape = (min(count, self.buffer_size), self.layout.width)
        if rows.shape != expected_shape:
            raise ValueError(
                f"The stored replay buffer has {rows.shape[0]} rows of {rows.shape[1]} numbers, this one up to "
                f"{self.buffer_size} of {self.layout.width}: load it with the same sizes and `buffer_size`."
            )
        self._rows[: len(rows)] = rows
        self.count = count


class RolloutBuffer:
    """Keep transitions in the order in which they came, until they are taken.

    Args:
        layout: How a transition becomes a row.

    Example:
        >>> rollout = RolloutBuffer(Layout(observation_size=1, low=torch.zeros(1), high=torch.ones(1)))
        >>> for reward in (1.0, 2.0, 3.0):
        ...     rollout.add(Transition([0.0], [0.5], reward, [0.0], terminated=reward == 3.0))
        >>> rollout.take().reward.flatten(), len(rollout)
        (tensor([1., 2., 3.]), 0)
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._steps: list[Tensor] = []  # (environments, width) each

    def __len__(self) -> int:
        """Return the number of transitions kept, over all environments."""
        return sum(len(rows) for rows in self._steps)

    def add(self, transition: Transition) -> None:
        """Store a step, in one environment or in several, always the same number.

        Args:
            transition: The step.

        Raises:
            ValueError: If the number of environments changes.
        """
        rows = self.layout.pack(transition)
        if self._steps and len(rows) != len(self._steps[0]):
            raise ValueError(
                f"A transition has {len(rows)} environments, those before had {len(self._steps[0])}: call update() "
                "before their number changes."
            )
        self._steps.append(rows)

    def take(self) -> Transition:
        """Return all transitions, with shapes (steps, environments, ...), and forget them."""
        rows = torch.stack(self._steps)
        self._steps.clear()
        return self.layout.unpack(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        device = self.layout.low.device
        self._steps = [rows.to(device) for rows in state["steps"]]
