"""Checkpoints of pruned models: the plan travels with the weights, and the original class takes its shape from it."""

from lightning_prune.checkpoint.loading import asked_for, load_onto, load_pruned, made
from lightning_prune.checkpoint.names import renamed_for
from lightning_prune.checkpoint.plain import load, save
from lightning_prune.checkpoint.plans import (
    CHECKPOINT_KEY,
    brings_channels_back,
    fitted,
    has_copies,
    note_copies,
    plan_belongs_to,
    prune_copies,
    refuse_other_shapes,
    restore_shape,
    save_plan,
    saved_plan,
    widened,
)

__all__ = [
    "CHECKPOINT_KEY",
    "asked_for",
    "brings_channels_back",
    "fitted",
    "has_copies",
    "load",
    "load_onto",
    "load_pruned",
    "made",
    "note_copies",
    "plan_belongs_to",
    "prune_copies",
    "refuse_other_shapes",
    "renamed_for",
    "restore_shape",
    "save",
    "save_plan",
    "saved_plan",
    "widened",
]
