"""Prune early: how much each layer gives is told by the entropy of its weights after the first epoch."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.criteria import afie
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["AFIEEarlyPruneCallback"]


class AFIEEarlyPruneCallback(PruningCallback):
    """Prune once, after the first epoch: layers whose weights carry less average filter information entropy lose more.

    A group loses the fraction ``t / entropy`` of its channels, at most 0.99, with the same ``t`` for all, found so that
    the budget is met. The entropy is measured at the first prune, and not again if there are several.

    Args:
        within: What chooses the channels within a group: a criterion, such as ``"l1"``, ``"l2"`` or ``"random"``.
        flatten: Read a filter as one row of inputs times positions, instead of averaging it over its positions.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`.

    Note:
        The method is that of Lu et al., "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI
        2024). Its budget counts filters, which is ``metric="channels"`` here. The paper does not say how filters are
        chosen within a layer; the smallest L1 norm is a choice made here, as are several prunes, ``flatten`` and what
        becomes of coupled layers (see `lightning_prune.criteria.afie`). The first layer has few inputs, so that it is
        pruned strongly; put it into ``ignore`` to keep it whole.

    Example:
        >>> callback = AFIEEarlyPruneCallback(keep=0.5, metric="channels", within="l2")
        >>> callback.start_epoch, callback.steps, callback.criterion
        (1, 1, 'l2')
    """

    cap = 0.99  # as in the paper

    def __init__(self, within: str | dict[str, Any] = "l1", flatten: bool = False, **settings: Any) -> None:
        super().__init__(criterion=within, **settings)
        self.flatten = flatten
        self.entropy: dict[str, float] = {}

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        self.entropy = self.entropy or afie(graph, self.flatten)
        return plan_by_layer(graph, self.entropy, scores, keep, self.metric, self.round_to, self.min_channels, self.cap)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "entropy": self.entropy}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.entropy = dict(state_dict["entropy"])

    @override
    def _start_anew(self) -> None:
        super()._start_anew()
        self.entropy = {}
