"""Distributed training of a model whose parameters have changed, by any trainer with a strategy that wraps in DDP."""

from typing import Any

from torch import nn

__all__ = ["rewrap"]


def rewrap(trainer: Any) -> None:
    """Wrap the model for distributed training anew: the wrapper knows only the parameters it was made with.

    Args:
        trainer: The trainer, whose ``strategy`` has the wrapped ``model`` and wraps it in ``configure_ddp()``. Nothing
            is done if that model is not wrapped.
    """
    strategy = trainer.strategy
    wrapper = getattr(strategy, "model", None)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        strategy.model = wrapper.module
        try:
            strategy.configure_ddp()
        except BaseException:
            strategy.model = wrapper
            raise
