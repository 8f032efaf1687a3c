"""Agents that learn which channels to prune: small, seeded, and checkpointed to the bit."""

from lightning_prune.agents.base import Agent
from lightning_prune.agents.environment_model import EnvironmentModel
from lightning_prune.agents.ppo import PPO
from lightning_prune.agents.random_search import RandomSearch
from lightning_prune.agents.registry import AGENTS, make_agent
from lightning_prune.agents.reinforce import Reinforce
from lightning_prune.agents.sac import SAC
from lightning_prune.agents.transition import Transition

__all__ = [
    "AGENTS",
    "PPO",
    "SAC",
    "Agent",
    "EnvironmentModel",
    "RandomSearch",
    "Reinforce",
    "Transition",
    "make_agent",
]
