"""What all agents share: the interface, the bounds of actions, random numbers of their own, and checkpoints."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_prune.rl.transition import Layout, Transition

__all__ = ["Agent", "Checkpointed", "Context", "Stateful"]

Context = Callable[[Tensor], Tensor]


class Stateful(Protocol):
    """Anything that can be checkpointed."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state over."""


class Checkpointed(ABC):
    """Collect the states of some parts, and of random numbers of their own.

    Args:
        seed: Seed of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device
        self._generators = {"generator": self.generator}

    @abstractmethod
    def _parts(self) -> dict[str, Stateful]:
        """Return all that is checkpointed beside the random numbers, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that a later process needs to go on to the same bits."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        numbers = {name: generator.get_state() for name, generator in self._generators.items()}
        return copy.deepcopy({**state, **numbers})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` of an object with the same settings returned.

        Raises:
            ValueError: If it is the state of another kind of object.
        """
        parts = self._parts()
        if set(state) != {*parts, *self._generators}:
            raise ValueError(
                f"The state has the parts {', '.join(sorted(state))}; {type(self).__name__} has "
                f"{', '.join(sorted({*parts, *self._generators}))}: load it into the kind of agent it was saved from."
            )
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(state[name]))  # optimizers would go on with the tensors they are given
        for name, generator in self._generators.items():
            generator.set_state(state[name].cpu())


class Agent(Checkpointed):
    """Choose actions, observe what comes of them, and learn.

    Agents draw random numbers from generators of their own and leave the global one alone. Those with the same seed
    that observe the same transitions stay equal to the last bit, whatever each has explored, as on the ranks of a
    distributed run. There, `explore_from` makes an episode the same whichever rank plays it.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers, those of the first weights included.
        low: Least action, one number or one for each entry.
        high: Greatest action, one number or one for each entry.
        context: Given (n,) epochs, returns the (n, context) representation of the environment in each; it is joined to
            the observation. None is an environment that does not change.
        context_size: Numbers in such a representation.
        device: Where networks and transitions are kept.

    Raises:
        ValueError: If a least action is not below the greatest one, or only one of `context` and `context_size` is
            given.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        seed: int,
        *,
        low: float | Sequence[float] = 0.0,
        high: float | Sequence[float] = 1.0,
        context: Context | None = None,
        context_size: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(seed)
        if (context is None) != (context_size == 0):
            raise ValueError("Give both `context` and `context_size`, or neither.")
        self.low = torch.as_tensor(low, dtype=torch.float32, device=device).expand(action_size)
        self.high = torch.as_tensor(high, dtype=torch.float32, device=device).expand(action_size)
        if not bool((self.low < self.high).all() & (self.high - self.low).isfinite().all()):
            raise ValueError(f"`low` must be below `high`, and both finite, in each entry; got {low} and {high}.")
        self.observation_size = observation_size
        self.action_size = action_size
        self.input_size = observation_size + context_size
        self.device = torch.device(device)
        self.exploration = torch.Generator()
        self._generators["exploration"] = self.exploration
        self.explore_from(seed)
        self.layout = Layout(observation_size, self.low, self.high)
        self._context = context

    def explore_from(self, seed: int) -> None:
        """Draw what `act` explores from here on from a seed, such as one of the episode that begins.

        Args:
            seed: The seed. What is learned does not depend on it but through what is observed.

        Example:
            >>> from lightning_prune.search import make_agent
            >>> agent = make_agent("random", observation_size=1, action_size=1, seed=0)
            >>> agent.explore_from(7)
            >>> first = agent.act([0.0])
            >>> agent.explore_from(7)
            >>> torch.equal(agent.act([0.0]), first)
            True
        """
        self.exploration.manual_seed(seed)

    @torch.no_grad()
    def act(self, observation: Any, low: Any = None, high: Any = None, explore: bool = True, epoch: int = 0) -> Tensor:
        """Choose an action for each observation.

        Args:
            observation: (..., observation) what the agent sees.
            low: (..., action) least action allowed in this step; None is that of the agent.
            high: (..., action) greatest action allowed in this step.
            explore: Whether to try things out; otherwise the best known action is returned.
            epoch: The epoch of training that the environment is in.

        Returns:
            (..., action) actions within the bounds, on the CPU. The leading shapes are broadcast, so that bounds with
            m rows draw m actions for one observation.

        Raises:
            ValueError: If the observation has another size or a number that is not finite, or no action is allowed.

        Example:
            >>> from lightning_prune.search import make_agent
            >>> agent = make_agent("sac", observation_size=3, action_size=1, seed=0)
            >>> agent.act([0.1, 0.2, 0.3], low=[0.4], high=[0.4])
            tensor([0.4000])
        """
        seen = torch.as_tensor(observation, dtype=torch.float32).to(self.device)
        if seen.shape[-1:] != (self.observation_size,):
            raise ValueError(f"An observation has {self.observation_size} numbers; got shape {tuple(seen.shape)}.")
        if not bool(seen.isfinite().all()):
            raise ValueError("An observation has a number that is not finite.")
        least, greatest = self._bounds(low, high)
        return self._choose(seen, least, greatest, explore, epoch).cpu()

    @abstractmethod
    def observe(self, transition: Transition) -> None:
        """Take note of a step.

        Args:
            transition: The step, with the action as it was executed.
        """

    @abstractmethod
    def update(self) -> dict[str, float]:
        """Learn from what was observed, once.

        Returns:
            Losses and other figures by name; nothing if there is not enough to learn from yet.
        """

    @abstractmethod
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, explore: bool, epoch: int) -> Tensor:
        """Return the actions for (..., observation) tensors, within bounds that have been checked."""

    def _bounds(self, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        if low is None and high is None:
            return self.low, self.high
        least = self.low if low is None else torch.as_tensor(low, dtype=torch.float32).to(self.device)
        greatest = self.high if high is None else torch.as_tensor(high, dtype=torch.float32).to(self.device)
        if not bool((least <= greatest).all()):
            raise ValueError(f"No action is allowed: the least is {least.tolist()}, the greatest {greatest.tolist()}.")
        return least, greatest

    def _inputs(self, observation: Tensor, epoch: int | Tensor) -> Tensor:
        """Join the representation of the environment to the observations."""
        if self._context is None:
            return observation
        epochs = torch.as_tensor(epoch, device=self.device).long().expand(observation.shape[:-1])
        return torch.cat([observation, self._context(epochs).detach()], dim=-1)

    def _uniform(self, low: Tensor, high: Tensor, leading: torch.Size) -> Tensor:
        """Draw actions of which all within the bounds have the same chance, one for each place of the shapes."""
        shape = torch.broadcast_shapes((*leading, self.action_size), low.shape, high.shape)
        share = torch.rand(shape, generator=self.exploration).to(self.device)
        return torch.minimum(torch.maximum(low + share * (high - low), low), high)
