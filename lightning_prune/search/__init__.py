"""Search: pruning as a sequence of decisions, the agents that make them, and the controls to compare them with."""

from lightning_prune.search.agents import AGENTS, make_agent
from lightning_prune.search.controls import CONTROLS
from lightning_prune.search.random_search import RandomSearch
from lightning_prune.search.searches import make_search

__all__ = ["AGENTS", "CONTROLS", "RandomSearch", "make_agent", "make_search"]
