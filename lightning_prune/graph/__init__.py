"""Tracing: which channels can only be pruned together, which cannot be pruned, and why."""

from lightning_prune.graph.channel_graph import ChannelGraph, Group, Unprunable
from lightning_prune.graph.rules import rule
from lightning_prune.graph.sizes import size_attributes
from lightning_prune.graph.tracing import trace

__all__ = ["ChannelGraph", "Group", "Unprunable", "rule", "size_attributes", "trace"]
