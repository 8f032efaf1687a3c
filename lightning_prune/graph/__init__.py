"""Tracing: which channels leave together, which may not, and why."""

from lightning_prune.graph.channel_graph import ChannelGraph, Group, Held
from lightning_prune.graph.modules import size_attributes
from lightning_prune.graph.rules import rule
from lightning_prune.graph.tracing import trace

__all__ = ["ChannelGraph", "Group", "Held", "rule", "size_attributes", "trace"]
