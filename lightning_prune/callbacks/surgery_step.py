"""One prune in the middle of training: the module, and everything that has to follow it."""

from collections.abc import Sequence
from dataclasses import replace

import lightning.pytorch as pl

from lightning_prune.callbacks.followers import NONE, Following
from lightning_prune.callbacks.trainer_state import averaged_copies, averages
from lightning_prune.compiled import forget_compiled
from lightning_prune.ddp import rewrap
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import PruneReport, check, pruned
from lightning_prune.surgery.compensation import Compensation
from lightning_prune.surgery.pruning import Follower
from lightning_prune.surgery.replacing import Replacement, in_place
from lightning_prune.surgery.rollback import Snapshot, snapshot_of, went_back

__all__ = ["go_back_in_training", "prune_in_training", "snapshot_in_training"]


def prune_in_training(
    trainer: "pl.Trainer",
    plan: PruningPlan,
    compensations: Sequence[Compensation] = (),
    following: Following = NONE,
) -> PruneReport:
    """Prune the module of a trainer and what goes with it, or nothing of it.

    Its optimizers and averaged copies are pruned with it, it is wrapped for distributed training anew, and compiled
    code is forgotten.

    Args:
        trainer: The trainer.
        plan: The channels that are kept, the same on every rank.
        compensations: What the module, each averaged copy after it, and each copy that follows it, is to have in place
            of some tensors, the same on every rank; none to keep the values as they are.
        following: What else follows the weights of the module, and loses the same channels.

    Returns:
        What has changed.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what was pruned before.
        TypeError: If an optimizer cannot be sliced.
    """
    module = trainer.lightning_module
    copies = averaged_copies(trainer)
    with pruned(module, plan, trainer.optimizers, copies, following.elsewhere) as report:
        optimizers = check(module, trainer.optimizers)
        tensors = [*map(named_tensors, [module, *copies]), *following.copies]
        replacements: list[Replacement] = []
        for own, found in zip(tensors if compensations else [], compensations, strict=True):
            replacements.extend(found.replacements_of(own, optimizers))
        with in_place(replacements):
            rewrap(trainer)
    forget_compiled()
    if compensations:
        return replace(report, compensation=compensations[0].report)
    return report


def snapshot_in_training(trainer: "pl.Trainer", followers: Sequence[Follower] = ()) -> Snapshot:
    """Return what the module of a trainer is now, with its optimizers, averaged copies and followers.

    Args:
        trainer: The trainer.
        followers: What else follows the weights of the module.
    """
    others = [*followers, *_counters(trainer)]
    return snapshot_of(trainer.lightning_module, trainer.optimizers, averaged_copies(trainer), others)


def go_back_in_training(
    trainer: "pl.Trainer", snapshot: Snapshot, followers: Sequence[Follower] = ()
) -> PruningPlan | None:
    """Go back to a snapshot of the module of a trainer and what goes with it, or change nothing.

    Args:
        trainer: The trainer.
        snapshot: What `snapshot_in_training` has returned.
        followers: What else follows the weights of the module.

    Returns:
        The plan that is in force then; None for the original network.
    """
    module, copies = trainer.lightning_module, averaged_copies(trainer)
    others = [*followers, *_counters(trainer)]
    with went_back(module, snapshot, trainer.optimizers, copies, others) as plan:
        rewrap(trainer)
    forget_compiled()
    return plan


def _counters(trainer: "pl.Trainer") -> list[Follower]:
    """Return how many weights averages are made of."""
    return [Follower({"n_averaged": average.n_averaged}) for average in averages(trainer)]
