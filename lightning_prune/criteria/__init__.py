"""Criteria: pure functions that score channels, one per file; higher scores are kept."""

from lightning_prune.criteria.activations import apoz, mean_activation
from lightning_prune.criteria.batch_norm import batch_norm_scale
from lightning_prune.criteria.damage import layer_scores, sensitiveness
from lightning_prune.criteria.elimination import coherent_obs
from lightning_prune.criteria.filter_entropy import afie, afie_of_shapes
from lightning_prune.criteria.first_order import taylor
from lightning_prune.criteria.geometric_median import fpgm
from lightning_prune.criteria.group_norms import group_magnitude
from lightning_prune.criteria.layer_adaptive import lamp
from lightning_prune.criteria.loss_change import oracle
from lightning_prune.criteria.norms import l1, l2, magnitude
from lightning_prune.criteria.random_scores import random
from lightning_prune.criteria.registry import CRITERIA, register, score

__all__ = [
    "CRITERIA",
    "afie",
    "afie_of_shapes",
    "apoz",
    "batch_norm_scale",
    "coherent_obs",
    "fpgm",
    "group_magnitude",
    "l1",
    "l2",
    "lamp",
    "layer_scores",
    "magnitude",
    "mean_activation",
    "oracle",
    "random",
    "register",
    "score",
    "sensitiveness",
    "taylor",
]
