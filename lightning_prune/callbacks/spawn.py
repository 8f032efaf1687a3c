"""Bring the pruned shape back from processes that Lightning spawns or forks.

With ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` the training runs in child processes, and the parent loads their
last weights into its own module, which has its original shape. No hook of a callback runs in the parent, so the two
methods of Lightning's launcher that hand results over are extended here, once, to hand over the plan as well.
"""

from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_prune.graph.channel_graph import plan_in_force
from lightning_prune.plan import PruningPlan
from lightning_prune.surgery import reshape

__all__ = ["hand_over_plans"]

_KEY = "lightning_prune_plan"


def hand_over_plans() -> None:
    """Extend Lightning's multi-process launcher to carry the plan from the child processes to the parent."""
    if hasattr(_MultiProcessingLauncher, "_carries_plans"):
        return
    collect = _MultiProcessingLauncher.get_extra_results
    recover = _MultiProcessingLauncher._recover_results_in_main_process

    @wraps(collect)
    def get_extra_results(self: _MultiProcessingLauncher, trainer: "pl.Trainer") -> dict[str, Any]:
        extra = collect(self, trainer)
        plan = plan_in_force(trainer.lightning_module)
        return extra if plan is None else {**extra, _KEY: plan.to_json()}

    @wraps(recover)
    def recover_results(self: _MultiProcessingLauncher, worker_output: Any, trainer: "pl.Trainer") -> None:
        plan = worker_output.extra.get(_KEY)
        if plan is not None:
            reshape(trainer.lightning_module, PruningPlan.from_json(plan))
        recover(self, worker_output, trainer)

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    _MultiProcessingLauncher._recover_results_in_main_process = recover_results  # type: ignore[method-assign]
    _MultiProcessingLauncher._carries_plans = True  # type: ignore[attr-defined]
