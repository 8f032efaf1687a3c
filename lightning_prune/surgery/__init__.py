"""Surgery: the only room that replaces tensors, those of a model and those of its optimizers."""

from lightning_prune.surgery.batch_norm import recalibrate
from lightning_prune.surgery.compensation import prune
from lightning_prune.surgery.masks import mask
from lightning_prune.surgery.pruning import PruneReport, check, check_plan, complete, pruned, pruned_tensors, reshape
from lightning_prune.surgery.replacing import uninterrupted

__all__ = [
    "PruneReport",
    "check",
    "check_plan",
    "complete",
    "mask",
    "prune",
    "pruned",
    "pruned_tensors",
    "recalibrate",
    "reshape",
    "uninterrupted",
]
