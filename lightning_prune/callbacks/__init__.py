"""Drop-in callbacks that prune a network while it trains."""

from lightning_prune.callbacks.afie import AFIEEarlyPruneCallback
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.extensions import extend_lightning
from lightning_prune.callbacks.learn_to_prune import LearnToPruneCallback
from lightning_prune.callbacks.rl_joint import RLJointPruneCallback
from lightning_prune.callbacks.sensitiveness import SensitivenessCallback
from lightning_prune.callbacks.taylor import TaylorRankCallback

__all__ = [
    "AFIEEarlyPruneCallback",
    "LearnToPruneCallback",
    "PruningCallback",
    "RLJointPruneCallback",
    "SensitivenessCallback",
    "TaylorRankCallback",
]

extend_lightning()
