"""An agent that looks for the widths that earn most, while the network may change from epoch to epoch."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_prune.rl.environment_model import EnvironmentModel
from lightning_prune.rl.transitions import Transition
from lightning_prune.search.agents import make_agent
from lightning_prune.search.episodes import Residual, play
from lightning_prune.search.filling import filled
from lightning_prune.search.pruning_problem import OBSERVATION_SIZE, PruningProblem
from lightning_prune.search.random_search import RandomSearch
from lightning_prune.search.width_search import Census, Tried, WidthSearch

__all__ = ["REWARDED", "PolicySearch"]

REWARDED = ("every_step", "last_step")
AROUND = ("nothing", "uniform", "allocation", "best")
AGAINST = ("first", "best")


_CONSTANT = 0.01  # a smaller deviation of the actions, fractions of the channels, is that of a constant agent


class PolicySearch(WidthSearch):
    """Let an agent play episodes, and learn from what they have earned.

    Agents learn from rewards from which the mean of the first episodes is subtracted, and which are divided by their
    standard deviation, so that the same settings serve for every network; the environment model learns from the
    rewards themselves.

    Args:
        agent: As for `make_agent`: a name, or the import path of a class.
        steps: Number of steps of an episode.
        episodes: Number of episodes before each round of learning, at least 2.
        epochs: Number of epochs that there can be.
        seed: Seed of all random numbers.
        rewarded: ``"every_step"``: each step earns what its episode earned in the end, and looks no further ahead;
            ``"last_step"``: the last step earns it, and earlier ones learn of it step by step.
        agent_updates: Updates of the agent in a round of learning.
        environment_updates: Updates of the environment model in a round of learning.
        environment_size: Numbers in the representation of an epoch that the agent is given; 0 for no environment model.
        agent_settings: As for the agent's class.
        around: ``"nothing"``: actions are the fractions that are pruned, as in the papers; ``"uniform"``: they are
            deviations from the same share of every group; ``"allocation"``: from what a ranking of all channels by
            their scores leaves to each group; ``"best"``: from the best plan so far, at first from the same share.
        span: Greatest deviation, as a fraction of the channels of a group.
        against: ``"first"``: the mean of the first rewards is subtracted from all; ``"best"``: the best one before.

    Raises:
        ValueError: If a setting is unknown or out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> problem = PruningProblem(trace(model, torch.zeros(1, 1)), keep=0.5, metric="params")
        >>> search = PolicySearch("ppo-clip", steps=2, episodes=16)
        >>> for _ in range(20):
        ...     widths = search.explore(problem)
        ...     figures = search.learn(torch.from_numpy(widths[:, 0]) / 8)  # the wider the first layer, the better
        >>> search.settle(problem)
        array([[8, 3]])
    """

    def __init__(
        self,
        agent: str,
        *,
        steps: int,
        episodes: int = 10,
        epochs: int = 1,
        seed: int = 0,
        rewarded: str = "every_step",
        agent_updates: int = 200,
        environment_updates: int = 100,
        environment_size: int = 0,
        agent_settings: Mapping[str, Any] | None = None,
        around: str = "nothing",
        span: float = 0.25,
        against: str = "first",
    ) -> None:
        _check_choice("rewarded", rewarded, REWARDED)
        _check_choice("around", around, AROUND)
        _check_choice("against", against, AGAINST)
        if not 0 < span <= 1:
            raise ValueError(f"span must be a fraction of the channels, above 0 and at most 1; got {span!r}.")
        if episodes < 2:
            raise ValueError(f"episodes must be at least 2, for rewards to be compared; got {episodes!r}.")
        super().__init__(episodes)
        self.rewarded = rewarded
        self.around = around
        self.span = span
        self.against = against
        self.agent_updates = agent_updates
        self.environment_updates = environment_updates
        self.environment: EnvironmentModel | None = None
        settings = _default_settings(agent, steps, episodes, rewarded)
        settings |= agent_settings or {}
        if environment_size:
            self.environment = EnvironmentModel(
                OBSERVATION_SIZE, 1, seed, epochs=epochs, representation_size=environment_size
            )
            settings |= {"context": self.environment.representation, "context_size": environment_size}
        self.agent = make_agent(agent, OBSERVATION_SIZE, 1, seed, **settings)
        self.scale: RewardScale | None = None  # of the first rewards
        self.constant: bool | None = None  # whether the agent does the same whatever it sees
        self._played: list[Transition] = []

    @override
    def _propose(self, problem: PruningProblem, epoch: int) -> np.ndarray:
        """Play episodes to learn from."""
        residual = self._residual(problem)
        widths, self._played = play(problem, self.agent, self.episodes, epoch=epoch, residual=residual)
        return widths

    def _residual(self, problem: PruningProblem) -> Residual | None:
        """Return what actions mean now."""
        if self.around == "nothing":
            return None
        best = self.tried.best()
        if self.around == "allocation":
            widths = problem.allocation()
        elif self.around == "uniform" or best is None:
            widths = filled(problem, problem.sizes)
        else:
            widths = np.array(best[0])
        return Residual(1 - widths / problem.sizes, self.span)

    @override
    def settle(self, problem: PruningProblem, epoch: int = 0) -> np.ndarray:
        residual = self._residual(problem)
        widths, _ = play(problem, self.agent, 1, greedy=True, epoch=epoch, residual=residual)
        return widths

    @override
    def census(self) -> Census:
        return self.tried.census(self.constant)

    @override
    def _learn(self, widths: np.ndarray, rewards: Tensor) -> dict[str, float]:
        if self.scale is None:
            self.scale = RewardScale.of(rewards)
        seen = torch.cat([transition.observation for transition in self._played])
        epoch = self._played[0].epoch
        scale = self.scale
        if self.against == "best" and self._best_before is not None:
            scale = replace(scale, mean=self._best_before)
        self._observe(rewards, scale.standardised(rewards))
        figures: dict[str, float] = {}
        # The agent first: what it saw when it acted must be what it sees when it learns from that.
        for _ in range(self.agent_updates):
            figures |= self.agent.update()
        if self.environment is not None:
            for _ in range(self.environment_updates):
                figures |= self.environment.update()
        if not isinstance(self.agent, RandomSearch):
            actions = self.agent.act(seen, greedy=True, epoch=epoch)
            self.constant = bool(actions.std() < _CONSTANT)
        return figures

    @override
    def state_dict(self) -> dict[str, Any]:
        environment = None if self.environment is None else self.environment.state_dict()
        scale = None if self.scale is None else astuple(self.scale)
        return {
            "agent": self.agent.state_dict(),
            "environment": environment,
            "scale": scale,
            "tried": dict(vars(self.tried)),
            "constant": self.constant,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.environment is not None:
            self.environment.load_state_dict(state["environment"])
        self.agent.load_state_dict(state["agent"])
        self.scale = None if state["scale"] is None else RewardScale(*state["scale"])
        self.tried = Tried(**state.get("tried", {}))  # of which earlier versions told nothing
        self.constant = state.get("constant")

    def _observe(self, rewards: Tensor, standardised: Tensor) -> None:
        """Let agent and environment model take note of what was played: (episodes,) rewards, and as agents learn."""
        for transition in self._played:
            earns = self.rewarded == "every_step" or transition.terminated
            self.agent.observe(replace(transition, reward=standardised if earns else 0.0))
            if self.environment is not None:
                self.environment.observe(replace(transition, reward=rewards))
        self._played = []


def _check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{setting} must be one of {', '.join(choices)}; got {value!r}.")


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of the first rewards.

    Args:
        mean: The mean.
        std: The standard deviation, or a little more than 0 where the rewards hardly differ.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, rewards: Tensor) -> Self:
        """Measure the scale of (n,) rewards; differences are not blown up without limit."""
        return cls(float(rewards.mean()), max(float(rewards.std()), 0.01))

    def standardised(self, rewards: Tensor) -> Tensor:
        """Return rewards as agents learn from them."""
        return (rewards - self.mean) / self.std


def _default_settings(agent: str, steps: int, episodes: int, rewarded: str) -> dict[str, Any]:
    """Return the settings that suit some hundreds of episodes, where policies learn from those of one round.

    Gaussian policies start narrow: with the usual deviation of 1, a third of the draws lie beyond the range of actions
    and many more beyond the bounds of a step, and a draw that is clipped hardly says which way to go. Actions are at
    most 1 here and policies narrower still, where a kernel of the width 1 hardly tells two of them apart. REINFORCE
    makes a single step of the optimizer in each round, hence its great learning rate.
    """
    settings: dict[str, Any] = {}
    if agent == "reinforce":
        settings |= {"n_episodes": episodes, "learning_rate": 2e-2}
    if agent.startswith("ppo-"):
        settings |= {"rollout_size": steps * episodes, "learning_rate": 3e-3}
    if agent.startswith("ppo-cim"):
        settings["trust_region"] = {"sigma": 0.3}
    if agent == "reinforce" or agent.startswith("ppo-"):
        settings["policy"] = {"name": "gaussian", "initial_std": 0.3}
    if rewarded == "every_step" and (agent == "sac" or agent.startswith("ppo-")):
        settings["gamma"] = 0.0  # looks no further ahead
    return settings  # none for random search, and for agents from elsewhere, which know best
