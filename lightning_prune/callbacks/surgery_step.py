"""One prune in the middle of training: the module, and everything that has to follow it."""

import lightning.pytorch as pl

from lightning_prune.callbacks.trainer_state import averaged_copies
from lightning_prune.compiled import forget_compiled
from lightning_prune.ddp import rewrap
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import PruneReport, pruned

__all__ = ["prune_in_training"]


def prune_in_training(trainer: "pl.Trainer", plan: PruningPlan) -> PruneReport:
    """Prune the module of a trainer and what goes with it, or nothing of it.

    Its optimizers and averaged copies are pruned with it, it is wrapped for distributed training anew, and compiled
    code is forgotten.

    Args:
        trainer: The trainer.
        plan: The channels that are kept, the same on every rank.

    Returns:
        What has changed.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what was pruned before.
        TypeError: If an optimizer cannot be sliced.
    """
    with pruned(trainer.lightning_module, plan, trainer.optimizers, averaged_copies(trainer)) as report:
        rewrap(trainer)
    forget_compiled()
    return report
