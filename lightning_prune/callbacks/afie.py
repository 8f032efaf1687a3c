"""Early pruning: how much each layer gives is told by the entropy of its weights after the first epoch."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.runtimes import planned_metric
from lightning_prune.callbacks.state import under
from lightning_prune.criteria import afie
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["AFIEEarlyPruneCallback"]


class AFIEEarlyPruneCallback(PruningCallback):
    """Prune once, after the first epoch: layers whose weights carry less average filter information entropy lose more.

    A group loses the fraction ``t / entropy`` of its channels, at most 0.99, with the same ``t`` for all, found so that
    the budget is met. The entropy is measured at the first prune, and not again if there are several.

    Args:
        within: What chooses the channels within a group: a criterion, such as ``"l1"``, ``"l2"`` or ``"random"``.
        flatten: Take a filter as one row of inputs times positions, instead of averaging it over its positions.
        compensate: As for `PruningCallback`; the method itself knows of none.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`.

    Note:
        The method is that of Lu et al., "Entropy Induced Pruning Framework for Convolutional Neural Networks" (AAAI
        2024). Its budget counts filters, which is ``metric="channels"`` here. The paper does not say how filters are
        chosen within a layer; the smallest L1 norm is a choice made here, as are several prunes, ``flatten`` and what
        becomes of coupled layers (see `lightning_prune.criteria.afie`). The first layer has few inputs, so that it is
        pruned strongly; put it into ``ignore`` to keep all of its channels.

    Example:
        >>> callback = AFIEEarlyPruneCallback(keep=0.5, metric="channels", within="l2")
        >>> callback.start_epoch, callback.steps, callback.criterion
        (1, 1, 'l2')
    """

    @dataclass
    class State(PruningCallback.State):
        """What has to survive a checkpoint.

        Attributes:
            entropy: Average filter information entropy by group, once it is measured; on the first rank.
        """

        entropy: dict[str, float] = field(default_factory=dict, metadata=under("flatten", "ignore"))

    cap = 0.99  # as in the paper
    rankings = ("global",)

    state: State

    def __init__(
        self,
        within: str | dict[str, Any] = "l1",
        flatten: bool = False,
        compensate: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(criterion=within, compensate=compensate, **settings)
        self.flatten = flatten

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        if not self.state.entropy:
            self.state.entropy = afie(graph, self.flatten)
        limits = self.round_to, self.min_channels, self.cap
        return plan_by_layer(graph, self.state.entropy, scores, keep, planned_metric(self), *limits)
