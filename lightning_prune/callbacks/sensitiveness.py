"""Prune layers by the accuracy that they cost when they are damaged."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.planning.allocation import plan_by_layer
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches
from lightning_prune.candidates import classification, evaluate_candidates
from lightning_prune.criteria.damage import LEVELS, RATIOS, check_settings, layer_scores, sensitiveness
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["SensitivenessCallback"]


class SensitivenessCallback(PruningCallback):
    """Prune most where damage costs least accuracy: layers are damaged one by one and measured on the validation split.

    Before a prune, channels of each group are removed for a moment, or noise is added to its weights, and the accuracy
    is measured without training. Groups that lose little accuracy lose many channels, so that the budget is met.
    Training itself is not touched by the measurement. By default batches are ``(inputs, labels)``, and calling the
    LightningModule with the inputs returns the logits of a classifier.

    Args:
        damage: ``"random"`` removes random channels, ``"magnitude"`` those of the smallest L1 norm, ``"noise"`` adds
            Gaussian noise to the weights.
        levels: Fractions of channels that are removed, or strengths of the noise; see `sensitiveness`.
        draws: How many random damages are averaged at each level.
        ratio: ``"inverse"``: groups lose in inverse proportion to their sensitiveness; ``"complement"``: in proportion
            to 1 - s / s_max, with s the sensitiveness.
        remeasure: Measure anew before each prune; otherwise the first measurement serves for all.
        within: What chooses the channels within a group: a criterion, such as ``"l1"`` or ``"random"``.
        limit_batches: Number of validation batches to measure on; default all that validation runs on.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (any score above 0; higher is
            better) as means over its examples; in YAML the import path of a function.
        seed: Seed of the random damages.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and ``evaluate`` is not given.

    Note:
        After Lu et al., "SBPF: Sensitiveness Based Pruning Framework For Convolutional Neural Network On Image
        Classification" (2022), of which only the abstract was at hand; see `lightning_prune.criteria.sensitiveness`
        for what is an interpretation. Measured in the precision of the weights, without autocast, on the first of
        several validation loaders.

    Example:
        >>> callback = SensitivenessCallback(keep=0.5, steps=2, damage="noise", levels=[0.5])
        >>> callback.damage, callback.levels, callback.draws
        ('noise', [0.5], 5)
    """

    cap = 0.99

    def __init__(
        self,
        damage: str = "random",
        levels: Sequence[float] = LEVELS,
        draws: int = 5,
        ratio: str = "inverse",
        remeasure: bool = True,
        within: str | dict[str, Any] = "l1",
        limit_batches: int | None = None,
        evaluate: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(criterion=within, **settings)
        check_settings(damage, levels, draws)
        if ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}; got {ratio!r}.")
        if limit_batches is not None and limit_batches < 1:
            raise ValueError(f"limit_batches must be a whole number of at least 1, or None; got {limit_batches!r}.")
        self.damage = damage
        self.levels = list(levels)
        self.draws = draws
        self.ratio = ratio
        self.remeasure = remeasure
        self.limit_batches = limit_batches
        self.evaluate = evaluate
        self.seed = seed
        self.sensitiveness: dict[str, float] = {}

    @override
    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().prepare(trainer, pl_module)
        assert self._graph is not None
        if self.steps_done < self.steps:  # refuse now what would fail at the first prune
            first = ValidationBatches(trainer, 1, type(self).__name__)
            evaluate_candidates(self._graph, [{}], first, evaluate=self.evaluate or classification, own_data=True)

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        if self.remeasure or not self.sensitiveness:
            batches = ValidationBatches(trainer, self.limit_batches, type(self).__name__)
            self.sensitiveness = sensitiveness(
                graph, batches, self.damage, self.levels, self.draws, self.seed, self.evaluate or classification,
                own_data=True,
            )  # fmt: skip
        return super().scores(trainer, graph)

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        importance = layer_scores(self.sensitiveness, self.ratio)
        return plan_by_layer(graph, importance, scores, keep, self.metric, self.round_to, self.min_channels, self.cap)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sensitiveness": self.sensitiveness}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.sensitiveness = dict(state_dict["sensitiveness"])

    @override
    def _start_anew(self) -> None:
        super()._start_anew()
        self.sensitiveness = {}
