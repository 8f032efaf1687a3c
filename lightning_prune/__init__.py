"""Structured pruning for PyTorch Lightning: the network gets physically smaller while it trains."""

from lightning_prune import criteria
from lightning_prune.checkpoint import load, load_pruned, save
from lightning_prune.graph import trace
from lightning_prune.planning.by_score import plan
from lightning_prune.post_training import prune_for
from lightning_prune.surgery import prune

__all__ = ["criteria", "load", "load_pruned", "plan", "prune", "prune_for", "save", "trace"]
__version__ = "0.1.0"
