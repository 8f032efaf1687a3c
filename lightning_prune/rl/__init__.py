"""Reinforcement learning: SAC, PPO and REINFORCE; small, seeded, and resumed to the same bits."""

from lightning_prune.rl.agent import Agent, AgentSettings
from lightning_prune.rl.environment_model import EnvironmentModel
from lightning_prune.rl.ppo import PPO
from lightning_prune.rl.reinforce import Reinforce
from lightning_prune.rl.sac import SAC
from lightning_prune.rl.transitions import Transition

__all__ = ["PPO", "SAC", "Agent", "AgentSettings", "EnvironmentModel", "Reinforce", "Transition"]
