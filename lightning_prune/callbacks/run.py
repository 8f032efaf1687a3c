"""The run of a pruning callback: what refers to the module, the graph or the trainer while it trains."""

from dataclasses import dataclass, field

import lightning.pytorch as pl

from lightning_prune.callbacks.distilling import Distiller
from lightning_prune.callbacks.prune_batches import PruneBatches
from lightning_prune.callbacks.recording import Recorder
from lightning_prune.callbacks.validating import Validator
from lightning_prune.candidates import classification
from lightning_prune.candidates.measures import Evaluate
from lightning_prune.graph import ChannelGraph

__all__ = ["Run"]


@dataclass
class Run:
    """What exists from the start to the end of training; it is never saved, copied or pickled.

    Subclasses add fields, each with a default or with ``field(init=False)`` and set when training starts.

    Attributes:
        trainer: The trainer.
        graph: The traced model.
        recorder: What measures and records the network.
        step: Number of the prune that is being made, or was made last, from 1.
        epoch: The epoch that has begun.
        untried: The groups that were pruned since the last training step.
        batches: The training batches that prunes look at.
        validator: What tells the validation metrics around prunes.
        distiller: What joins the teacher's share to the loss, if there is to be a teacher.
        evaluate: What measures sub-networks, in callbacks that do.
    """

    trainer: "pl.Trainer"
    graph: ChannelGraph
    recorder: Recorder
    validator: Validator
    batches: PruneBatches
    step: int = 0
    epoch: int | None = None
    untried: list[str] = field(default_factory=list)
    distiller: Distiller | None = None
    evaluate: Evaluate = classification

    def end(self) -> None:
        """Undo what the run has done to the module, such as hooks; called also if training fails."""
