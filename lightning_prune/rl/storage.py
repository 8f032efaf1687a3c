"""Where agents keep transitions: a replay buffer for those that learn off policy, a rollout for those on policy."""

from typing import Any

import torch
from torch import Tensor

from lightning_prune.rl.transition import Layout, Transition

__all__ = ["ReplayBuffer", "Rollout"]


class ReplayBuffer:
    """Keep the last `capacity` transitions and draw from them.

    Args:
        layout: How a transition becomes a row.
        capacity: Number of transitions kept; after that the oldest are overwritten.

    Example:
        >>> layout = Layout(observation_size=1, low=torch.zeros(1), high=torch.ones(1))
        >>> buffer = ReplayBuffer(layout, capacity=2)
        >>> for reward in (1.0, 2.0, 3.0):
        ...     buffer.add(Transition([0.0], [0.5], reward, [0.0], terminated=True))
        >>> len(buffer), buffer.count
        (2, 3)
        >>> sorted(set(buffer.sample(32, torch.Generator().manual_seed(0)).reward.tolist()))
        [2.0, 3.0]
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self.count = 0  # transitions ever added
        self._rows = torch.zeros(capacity, layout.width, device=layout.low.device)

    def __len__(self) -> int:
        """Return the number of transitions kept."""
        return min(self.count, self.capacity)

    def add(self, transition: Transition) -> None:
        """Store a step, in one environment or in several.

        Args:
            transition: The step.
        """
        rows = self.layout.pack(transition)
        places = torch.arange(self.count, self.count + len(rows), device=rows.device) % self.capacity
        self._rows[places] = rows
        self.count += len(rows)

    def sample(self, size: int, generator: torch.Generator) -> Transition:
        """Draw transitions, each with the same chance and with replacement.

        Args:
            size: Number of transitions.
            generator: Source of random numbers, on the CPU.
        """
        places = torch.randint(len(self), (size,), generator=generator).to(self._rows.device)
        return self.layout.unpack(self._rows[places])

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
        rows, count = state["rows"], state["count"]
        if rows.shape != (min(count, self.capacity), self.layout.width):
            raise ValueError(
                f"The stored replay buffer has {rows.shape[0]} rows of {rows.shape[1]} numbers, this one holds up to "
                f"{self.capacity} of {self.layout.width}: load it with the same sizes and `capacity`."
            )
        self._rows[: len(rows)] = rows
        self.count = count


class Rollout:
    """Keep transitions in the order in which they came, until they are taken.

    Args:
        layout: How a transition becomes a row.

    Example:
        >>> rollout = Rollout(Layout(observation_size=1, low=torch.zeros(1), high=torch.ones(1)))
        >>> for reward in (1.0, 2.0, 3.0):
        ...     rollout.add(Transition([0.0], [0.5], reward, [0.0], terminated=reward == 3.0))
        >>> rollout.take().reward.flatten(), len(rollout)
        (tensor([1., 2., 3.]), 0)
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._steps: list[Tensor] = []

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
        """Return all transitions, with shapes (steps, n, ...), and forget them."""
        steps = torch.stack(self._steps)
        self._steps.clear()
        return self.layout.unpack(steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later process needs to go on."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned.
        """
        self._steps = [rows.to(self.layout.low.device) for rows in state["steps"]]
