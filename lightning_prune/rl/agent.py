"""Agents: the interface that all of them share, their common settings, and the checks of what they are given."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.rl.checkpointed import Checkpointed
from lightning_prune.rl.sampling import uniform_actions
from lightning_prune.rl.transitions import Layout, Transition

__all__ = ["Agent", "AgentSettings", "Context"]

Context = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class AgentSettings:
    """Settings that all agents have; an agent with settings of its own extends this class."""

    low: float | Sequence[float] = 0.0
    """Least action, one number or one for each entry."""
    high: float | Sequence[float] = 1.0
    """Greatest action, one number or one for each entry."""
    context: Context | None = None
    """Given (n,) epochs, returns the (n, context) representation of the environment in each; it is joined to the
    observation. None is an environment that does not change."""
    context_size: int = 0
    """Numbers in such a representation."""
    device: str | torch.device = "cpu"
    """Where networks and transitions are kept."""


class Agent(Checkpointed):
    """Choose actions, observe what comes of them, and learn.

    Agents draw random numbers from generators of their own and do not touch the global one. Those with the same seed
    that observe the same transitions stay equal to the last bit, whatever each has explored, as on the ranks of a
    distributed run. There, `explore_from` makes an episode the same whichever rank plays it.

    A subclass names the dataclass of its settings as ``settings_type``.

    Args:
        observation_size: Numbers in an observation.
        action_size: Numbers in an action.
        seed: Seed of all random numbers, those of the first weights included.
        **settings: As for `AgentSettings`, or the dataclass that the subclass names.

    Raises:
        ValueError: If a least action is not below the greatest one, or only one of `context` and `context_size` is
            given.
    """

    settings_type: type[AgentSettings] = AgentSettings

    def __init__(self, observation_size: int, action_size: int, seed: int, **settings: Any) -> None:
        super().__init__(seed)
        self.settings = self.settings_type(**settings)
        if (self.settings.context is None) != (self.settings.context_size == 0):
            raise ValueError("Give both `context` and `context_size`, or neither.")
        self.observation_size = observation_size
        self.action_size = action_size
        self.input_size = observation_size + self.settings.context_size
        self.device = torch.device(self.settings.device)
        self.low = self._bound(self.settings.low)
        self.high = self._bound(self.settings.high)
        self._check_range()
        self.layout = Layout(observation_size, self.low, self.high)
        self.exploration = torch.Generator()
        self._generators["exploration"] = self.exploration
        self.explore_from(seed)

    def explore_from(self, seed: int) -> None:
        """Draw what `act` samples from here on from a seed, such as one of the episode that begins.

        Args:
            seed: The seed. What is learned does not depend on it but through what is observed.

        Example:
            >>> from lightning_prune.rl import SAC
            >>> agent = SAC(observation_size=1, action_size=1, seed=0)
            >>> agent.explore_from(7)
            >>> first = agent.act([0.0])
            >>> agent.explore_from(7)
            >>> torch.equal(agent.act([0.0]), first)
            True
        """
        self.exploration.manual_seed(seed)

    @torch.no_grad()
    def act(self, observation: Any, low: Any = None, high: Any = None, greedy: bool = False, epoch: int = 0) -> Tensor:
        """Choose an action for each observation.

        Args:
            observation: (..., observation) what the agent sees.
            low: (..., action) least action allowed in this step; None is that of the agent.
            high: (..., action) greatest action allowed in this step.
            greedy: Whether to return the best known action; otherwise one is sampled from the policy.
            epoch: The epoch that the environment is in.

        Returns:
            (..., action) actions within the bounds, on the CPU. The leading shapes are broadcast, so that bounds with
            m rows sample m actions for one observation.

        Raises:
            ValueError: If the observation has another size or a number that is not finite, no action is allowed, or a
                parameter of the agent is not finite.

        Example:
            >>> from lightning_prune.rl import SAC
            >>> agent = SAC(observation_size=3, action_size=1, seed=0)
            >>> agent.act([0.1, 0.2, 0.3], low=[0.4], high=[0.4])
            tensor([0.4000])
        """
        self._check_parameters()
        observations = self._checked_observation(observation)
        least, greatest = self._checked_bounds(low, high)
        return self._choose(observations, least, greatest, greedy, epoch).cpu()

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
    def _choose(self, observation: Tensor, low: Tensor, high: Tensor, greedy: bool, epoch: int) -> Tensor:
        """Return the actions for (..., observation) tensors, within bounds that have been checked."""

    def _inputs(self, observation: Tensor, epoch: int | Tensor) -> Tensor:
        """Join the representation of the environment to the observations: (..., observation + context)."""
        context = self.settings.context
        if context is None:
            return observation
        epochs = torch.as_tensor(epoch, device=self.device).long()
        representation = context(epochs.expand(observation.shape[:-1])).detach()
        return torch.cat([observation, representation], dim=-1)

    def _uniform(self, observation: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Draw actions that are equally probable everywhere within the bounds, one for each observation and bound."""
        shape = (*observation.shape[:-1], self.action_size)
        low, high, _ = torch.broadcast_tensors(low, high, low.new_empty(shape))
        return uniform_actions(self.exploration, low, high)

    def _bound(self, value: float | Sequence[float]) -> Tensor:
        """Return one of the settings `low` and `high` as (action,) numbers."""
        bound = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return bound.expand(self.action_size)

    def _check_parameters(self) -> None:
        for role, member in self._stateful().items():
            parameters = member.named_parameters() if isinstance(member, nn.Module) else ()
            for name, parameter in parameters:
                if not bool(parameter.isfinite().all()):
                    raise ValueError(
                        f"The parameter {name!r} in the {role} of {type(self).__name__} holds a number that is not "
                        "finite: it has learned too fast; lower its learning_rate."
                    )

    def _check_range(self) -> None:
        in_order = self.low < self.high
        finite = (self.high - self.low).isfinite()
        possible = in_order & finite
        if not bool(possible.all()):
            raise ValueError(
                "`low` must be below `high`, and both finite, in each entry; "
                f"got {self.settings.low} and {self.settings.high}."
            )

    def _checked_observation(self, observation: Any) -> Tensor:
        checked = torch.as_tensor(observation, dtype=torch.float32).to(self.device)
        if checked.shape[-1:] != (self.observation_size,):
            raise ValueError(f"An observation has {self.observation_size} numbers; got shape {tuple(checked.shape)}.")
        if not bool(checked.isfinite().all()):
            raise ValueError("An observation has a number that is not finite.")
        return checked

    def _checked_bounds(self, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        if low is None and high is None:
            return self.low, self.high
        least = self._tensor(self.low if low is None else low)
        greatest = self._tensor(self.high if high is None else high)
        if not bool((least <= greatest).all()):
            raise ValueError(f"No action is allowed: the least is {least.tolist()}, the greatest {greatest.tolist()}.")
        return least, greatest

    def _tensor(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).to(self.device)
