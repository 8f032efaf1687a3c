"""Pruning by sensitiveness: layers are pruned by the accuracy that they cost when they are damaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.batches import ValidationBatches, check_limit
from lightning_prune.callbacks.monitoring import check_measure, measure_in
from lightning_prune.callbacks.runtimes import planned_metric
from lightning_prune.callbacks.state import under
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.criteria.damage import LEVELS, RATIOS, check_settings, layer_scores, sensitiveness
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["SensitivenessCallback"]


class SensitivenessCallback(PruningCallback):
    """Prune most where damage costs least accuracy: layers are damaged one by one and measured on the validation split.

    Before a prune, channels of each group are masked for a moment, or noise is added to its weights, and the accuracy
    is measured without training. Groups that lose little accuracy lose many channels, so that the budget is met.
    Training itself is not touched by the measurement. By default batches are ``(inputs, labels)``, and calling the
    LightningModule with the inputs returns the logits of a classifier.

    Args:
        damage: ``"random"`` masks random channels, ``"magnitude"`` those of the smallest L1 norm, ``"noise"`` adds
            Gaussian noise to the weights.
        levels: Fractions of channels that are masked, or strengths of the noise; see `sensitiveness`.
        draws: How many random damages are averaged at each level.
        ratio: ``"inverse"``: groups lose in inverse proportion to their sensitiveness; ``"complement"``: in proportion
            to 1 - s / s_max, with s the sensitiveness.
        remeasure: Measure anew before each prune; otherwise the first measurement serves for all.
        within: What chooses the channels within a group: a criterion, such as ``"l1"`` or ``"random"``.
        limit_batches: Number of validation batches to measure on; default all that validation runs on.
        evaluate: Given the LightningModule and a batch, returns loss and accuracy (any score above 0; higher is
            better) as means over its samples; in YAML the import path of a function.
        monitor: Name of a metric that the module's own ``validation_step`` logs, to be measured in place of accuracy;
            the mean over batches counts.
        mode: ``"max"`` if much of that metric is good, ``"min"`` if little is.
        seed: Seed of the random damages.
        compensate: As for `PruningCallback`; the method itself knows of none.
        settings: As for `PruningCallback`, without ``criterion``.

    Raises:
        ValueError: As `PruningCallback`; when training starts also if there is no validation split, or its batches
            are not ``(inputs, labels)`` of a classifier and neither ``evaluate`` nor ``monitor`` is given.

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

    @dataclass
    class State(PruningCallback.State):
        """What has to survive a checkpoint.

        Attributes:
            sensitiveness: Sensitiveness by group, as last measured.
        """

        sensitiveness: dict[str, float] = field(
            default_factory=dict,
            metadata=under(
                "damage", "levels", "draws", "seed", "limit_batches", "evaluate", "monitor", "mode", "ignore"
            ),
        )

    cap = 0.99

    rankings = ("global",)

    state: State

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
        monitor: str | None = None,
        mode: str = "max",
        seed: int = 0,
        compensate: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(criterion=within, compensate=compensate, **settings)
        check_settings(damage, levels, draws)
        if ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}; got {ratio!r}.")
        check_limit(limit_batches)
        check_measure(evaluate, monitor, mode)
        self.damage = damage
        self.levels = list(levels)
        self.draws = draws
        self.ratio = ratio
        self.remeasure = remeasure
        self.limit_batches = limit_batches
        self.evaluate = evaluate
        self.monitor = monitor
        self.mode = mode
        self.seed = seed

    @override
    def prepare(self, trainer: "pl.Trainer", graph: ChannelGraph) -> None:
        if not self.is_complete:  # refuse now what would fail at the first prune
            self.run.evaluate = measure_in(self)
            one_batch = ValidationBatches(trainer, 1, type(self).__name__)
            evaluate_candidates(graph, [{}], one_batch, evaluate=self.run.evaluate, own_data=True)

    @override
    def scores(self, trainer: "pl.Trainer", graph: ChannelGraph) -> dict[str, Tensor]:
        if self.remeasure or not self.state.sensitiveness:
            batches = ValidationBatches(trainer, self.limit_batches, type(self).__name__)
            damages = self.damage, self.levels, self.draws, self.seed
            self.state.sensitiveness = sensitiveness(graph, batches, *damages, self.run.evaluate, own_data=True)
        return super().scores(trainer, graph)

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        by_group = layer_scores(self.state.sensitiveness, self.ratio)
        limits = self.round_to, self.min_channels, self.cap
        return plan_by_layer(graph, by_group, scores, keep, planned_metric(self), *limits)
