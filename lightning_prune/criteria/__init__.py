"""Criteria: pure functions that score channels, one per file; higher scores are kept."""

from lightning_prune.criteria.activations import apoz, mean_activation
from lightning_prune.criteria.afie import afie, afie_of_shapes
from lightning_prune.criteria.batch_norm_scale import batch_norm_scale
from lightning_prune.criteria.fpgm import fpgm
from lightning_prune.criteria.group_magnitude import group_magnitude
from lightning_prune.criteria.lamp import lamp
from lightning_prune.criteria.magnitude import l1, l2, magnitude
from lightning_prune.criteria.oracle import oracle
from lightning_prune.criteria.random import random
from lightning_prune.criteria.registry import CRITERIA, register, score
from lightning_prune.criteria.sensitiveness import layer_importance, sensitiveness
from lightning_prune.criteria.taylor import taylor

__all__ = [
    "CRITERIA",
    "afie",
    "afie_of_shapes",
    "apoz",
    "batch_norm_scale",
    "fpgm",
    "group_magnitude",
    "l1",
    "l2",
    "lamp",
    "layer_importance",
    "magnitude",
    "mean_activation",
    "oracle",
    "random",
    "register",
    "score",
    "sensitiveness",
    "taylor",
]
