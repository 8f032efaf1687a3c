"""Training as the benchmarks do it, on one device and without a word, and what is left of a network after it."""

from typing import Any

import lightning as L

from lightning_prune.models import ImageClassifier
from lightning_prune.pruning_plan import plan_in_force

__all__ = ["outcome", "quiet_trainer", "tested"]


def quiet_trainer(epochs: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a trainer that prints nothing, keeps nothing and does not validate.

    Args:
        epochs: How long it trains.
        callbacks: What takes part.
        options: Further options of the trainer; callbacks that measure on the validation split need
            ``limit_val_batches``.
    """
    usual = {
        "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
        "check_val_every_n_epoch": epochs + 1,
    }  # fmt: skip
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**usual, **options})


def tested(trainer: L.Trainer, module: ImageClassifier, data: L.LightningDataModule) -> float:
    """Return the accuracy on the test images, as a fraction."""
    (figures,) = trainer.test(module, data, verbose=False)
    return figures["test/accuracy"]


def outcome(trainer: L.Trainer, module: ImageClassifier, data: L.LightningDataModule) -> dict[str, Any]:
    """Return the accuracy on the test images, the share of the FLOPs that is left, and the widths."""
    plan = plan_in_force(module)
    pruned = plan is not None and plan.budget is not None
    return {
        "accuracy": tested(trainer, module, data),
        "flops": plan.budget["achieved"] if pruned else 1.0,
        "widths": plan.widths if pruned else {},
    }
