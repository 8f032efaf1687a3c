"""State that can be saved and loaded: several objects and random number generators as one."""

import copy
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch

__all__ = ["Checkpointed", "Stateful"]


class Stateful(Protocol):
    """Anything that can be checkpointed."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take over a state."""


class Checkpointed(ABC):
    """Save and load several objects, and random number generators of their own.

    Args:
        seed: Seed of the first generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device
        self._generators = {"generator": self.generator}

    @abstractmethod
    def _stateful(self) -> dict[str, Stateful]:
        """Return all objects that a checkpoint holds, by name; the random number generators are added to them."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that a later process needs to go on to the same bits."""
        state: dict[str, Any] = {}
        for name, member in self._stateful().items():
            state[name] = member.state_dict()
        for name, generator in self._generators.items():
            state[name] = generator.get_state()
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` of an object with the same settings returned.

        Raises:
            ValueError: If it is the state of another kind of object.
        """
        members = self._stateful()
        known = {*members, *self._generators}
        if set(state) != known:
            raise ValueError(
                f"The state has {', '.join(sorted(state))}; {type(self).__name__} has {', '.join(sorted(known))}: "
                "load it into the kind of agent or model that it was saved from."
            )
        for name, member in members.items():
            # Copied, because optimizers would go on with the very tensors that they are given.
            member.load_state_dict(copy.deepcopy(state[name]))
        for name, generator in self._generators.items():
            generator.set_state(state[name].cpu())
