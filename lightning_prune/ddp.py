"""Distributed training of a model whose parameters have changed."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

__all__ = ["rewrap"]


def rewrap(trainer: "pl.Trainer") -> None:
    """Wrap the model for distributed training anew: the wrapper knows only the parameters it was made with.

    Args:
        trainer: The trainer; nothing is done if its strategy wraps no model.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.parallel.DistributedDataParallel):
        strategy.model = strategy.model.module
        strategy.configure_ddp()
