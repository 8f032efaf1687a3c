"""Decisions of the first rank, which all ranks follow."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_prune.pruning_plan import PruningPlan

__all__ = ["agreed_plan", "decided_by_first_rank"]


def decided_by_first_rank(trainer: "pl.Trainer", decide: Callable[[], Any]) -> Any:
    """Return what a function returns on the first rank, on all ranks; the others do not call it.

    Args:
        trainer: The trainer.
        decide: What is called on the first rank; what it returns is pickled for the others.

    Raises:
        ValueError: On all ranks, if the function raises one on the first.
    """
    decided, error = None, ""
    if trainer.is_global_zero:
        try:
            decided = decide()
        except ValueError as raised:
            error = str(raised)
    decided, error = trainer.strategy.broadcast((decided, error))
    if error:
        raise ValueError(error)
    return decided


def agreed_plan(trainer: "pl.Trainer", make: Callable[[], PruningPlan]) -> PruningPlan:
    """Return the plan that the first rank makes, the same on every rank.

    Args:
        trainer: The trainer.
        make: What makes the plan; it is called on the first rank only.

    Raises:
        ValueError: If there is no such plan.
        RuntimeError: If what a rank has received is not what the first one has sent.
    """

    def plan_and_digest() -> tuple[dict[str, Any], str]:
        plan = make()
        return plan.to_json(), plan.digest

    content, digest = decided_by_first_rank(trainer, plan_and_digest)
    plan = PruningPlan.from_json(content)
    if plan.digest != digest:
        raise RuntimeError(
            f"Rank {trainer.global_rank} has received another plan than rank 0 has sent; see that all nodes run "
            "the same version of lightning-prune."
        )
    return plan
