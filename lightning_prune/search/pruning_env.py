"""Pruning as an environment of gymnasium."""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from typing_extensions import override

from lightning_prune.graph import ChannelGraph
from lightning_prune.search.episodes import PruningEpisodes
from lightning_prune.search.pruning_problem import OBSERVATION_SIZE, Measure, PruningProblem

__all__ = ["PruningEnv"]


class PruningEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Decide group after group what fraction of its channels is pruned; the reward comes at the end.

    Actions that would miss the budget are clipped, so that every episode ends within it. The last step returns the
    plan in ``info["plan"]``.

    Args:
        graph: The traced model; its weights are read anew at each reset.
        measure: Given plans, returns the reward of each; see `accuracy_of`.
        settings: As for `PruningProblem`: ``keep``, ``metric``, ``criterion``, ``round_to``, ``min_channels``, ``cap``.

    Raises:
        ValueError: If the budget cannot be reached.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        >>> env = PruningEnv(trace(model, torch.zeros(1, 1)), lambda plans: torch.ones(len(plans)), metric="params")
        >>> observation, info = env.reset()
        >>> observation, reward, terminated, truncated, info = env.step(np.array([0.25], np.float32))
        >>> reward, terminated, info["action"]
        (0.0, False, 0.25)
        >>> observation, reward, terminated, truncated, info = env.step(np.array([0.0], np.float32))
        >>> reward, terminated, info["plan"].widths
        (1.0, True, {'0': 6, '1': 4})
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - declared so by gymnasium

    def __init__(self, graph: ChannelGraph, measure: Measure, **settings: Any) -> None:
        self.graph = graph
        self.measure = measure
        self.settings = settings
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (OBSERVATION_SIZE,), np.float32)
        PruningProblem(graph, **settings)  # refuses what cannot be reached

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        problem = PruningProblem(self.graph, **self.settings)
        self._episode = PruningEpisodes(problem, n=1)
        return self._observation(), self._bounds()

    @override
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        episode = self._episode
        fraction = torch.from_numpy(np.asarray(action, dtype=np.float32))
        episode.step(fraction.reshape(1, 1))
        info: dict[str, Any] = {"action": float(episode.actions)}
        info |= self._bounds()
        reward = 0.0
        if episode.ended:
            plan = episode.problem.plan(episode.widths[0])
            info["plan"] = plan
            reward = float(self.measure([plan])[0])
        truncated = False
        return self._observation(), reward, episode.ended, truncated, info

    def _observation(self) -> np.ndarray:
        return self._episode.view.observation[0].numpy()

    def _bounds(self) -> dict[str, float]:
        """Return what is allowed in the next step."""
        view = self._episode.view
        return {"low": float(view.low), "high": float(view.high)}
