"""Search: pruning as a sequence of decisions, the agents that make them, and the controls to compare them with."""

from lightning_prune.search.agents import AGENTS, make_agent
from lightning_prune.search.random_search import RandomSearch

__all__ = ["AGENTS", "RandomSearch", "make_agent"]
