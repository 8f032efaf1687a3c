"""What a pruning callback records of a run: for its checkpoints, the loggers, and the table at the end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch import Tensor

from lightning_prune.callbacks.settings import settings_of
from lightning_prune.callbacks.trainer_state import metrics
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.metrics import METRICS
from lightning_prune.planning.spread import Spread
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.reporting.history import Compensation, History, MetricsAround
from lightning_prune.reporting.loggers import (
    log_end,
    log_history,
    log_hyperparameters,
    log_prune,
    run_folder,
    say,
    warn,
)
from lightning_prune.reporting.measurement import Measurement, measure
from lightning_prune.reporting.speed import compare_layers, compare_speed
from lightning_prune.reporting.summary import summarize, whereabouts
from lightning_prune.surgery.compensation import CompensationReport

if TYPE_CHECKING:
    from lightning_prune.callbacks.base import PruningCallback

__all__ = ["Recorder"]


@dataclass
class Recorder:
    """Measure a network while it is pruned, and write its history.

    The first rank alone measures and writes; all ranks call the methods alike.

    Args:
        trainer: The trainer.
        graph: The traced model.
        history: What has been recorded in a run that is resumed.

    Attributes:
        costs: What networks cost by each metric that is counted.
    """

    trainer: "pl.Trainer"
    graph: ChannelGraph
    history: History | None = None

    def __post_init__(self) -> None:
        self._is_written = False
        self._has_warned = False
        self.costs = {name: metric.cost_model(self.graph) for name, metric in METRICS.items() if metric.counted}

    @property
    def kept(self) -> dict[str, float]:
        """What is left now, as a fraction of the original, by metric."""
        widths = self._widths
        return {metric: cost(widths) / cost.original for metric, cost in self.costs.items()}

    def begin(self, callback: "PruningCallback") -> None:
        """Measure the network before the first prune, unless that is known."""
        if self.history is None and self.trainer.is_global_zero:
            with progress(f"Measuring {type(self.graph.model).__name__}"):
                kind = type(self.graph.model)
                model = f"{kind.__module__}.{kind.__qualname__}"
                self.history = History.begin(
                    model, type(callback).__name__, settings_of(callback), self.graph, self._measure()
                )

        if self.trainer.is_global_zero:
            log_hyperparameters(self.trainer, self.graph.module, self.kept)

    def add_prune(self, plan: PruningPlan, step: int, compensated: CompensationReport, metrics: MetricsAround) -> None:
        """Measure what a prune has left, and note it.

        Args:
            plan: What the network has been pruned to.
            step: The number of the prune, from 1.
            compensated: How the weights that are kept made up for it.
            metrics: The validation metrics around it.
        """
        if self.history is None or not self.trainer.is_global_zero:
            return
        self.history.add_prune(self.graph, plan, step, self.trainer.current_epoch, self._measure())
        added = self.history.prunes[-1]
        added.compensation = Compensation.of(compensated)
        added.metrics = metrics

    def take_back(self, plan: PruningPlan | None, step: int) -> None:
        """Note that the network went back to what an earlier prune has left.

        Args:
            plan: What is in force now; None for the original network.
            step: The number of that prune; 0 for the original network.
        """
        if self.history is None or not self.trainer.is_global_zero:
            return
        widths = plan.widths if plan is not None else {}
        self.history.take_back(self.graph, widths, step, self.trainer.current_epoch)
        self._write(self.history)

    def tell_prune(self, scores: dict[str, Tensor]) -> None:
        """Write and log the last prune, with the scores that led to it."""
        if self.history is None or not self.trainer.is_global_zero:
            return
        self._write(self.history)
        log_prune(self.trainer, self.history, scores)

    def add_validation(self) -> None:
        """Note the metrics of a validation."""
        if self.history is None or not self.trainer.is_global_zero or self.trainer.sanity_checking:
            return
        found = metrics(self.trainer)
        if not self.history.prunes:
            self.history.before.metrics = found
        self.history.add_epoch(self.trainer.current_epoch + 1, self.kept, found)
        self._write(self.history)

    def end(self, metrics_at_end: dict[str, float]) -> None:
        """Measure the network at the end of training, if it was pruned, and log it.

        Args:
            metrics_at_end: Its validation metrics, on the batches of those around prunes.
        """
        if self.history is None or not self.history.prunes or not self.trainer.is_global_zero:
            return
        with progress(f"Timing {type(self.graph.model).__name__} before and after, turn and turn about"):
            widths = {name: width for name, width in self._widths.items() if name in self.graph.groups}
            speed = compare_speed(self.graph, widths)  # of this part: another callback may have pruned another one
            self.history.add_times(speed, compare_layers(self.graph, widths))
        self.history.after = self._measure(speed.spread_after)
        self.history.after.metrics = metrics(self.trainer)
        self.history.metrics_at_end = metrics_at_end
        self._write(self.history)
        log_end(self.trainer, self.history)

    def tell(self, checkpoint: str) -> None:
        """Print the network before and after, and where its files are; to be called on all ranks.

        Args:
            checkpoint: The file with the network as it is now; "" if there is none.
        """
        run = run_folder(self.trainer) if self._is_written else None
        places = whereabouts(self.trainer, run, checkpoint)  # asks all ranks
        history = self.history
        if history is not None and history.after is not None:
            say("\n".join(["", *summarize(history.before, history.after, history.speed), "", *places]))

    def _write(self, history: History) -> None:
        """Write the history beside the logs; where that fails, say so once: training is worth more than its record."""
        try:
            log_history(self.trainer, history)
            self._is_written = True
        except OSError as raised:
            self._is_written = False
            if not self._has_warned:
                warn(
                    f"The history of this run could not be written to {str(run_folder(self.trainer))!r} ({raised}); "
                    "training goes on, and its checkpoints hold the history too."
                )
            self._has_warned = True

    @property
    def _widths(self) -> dict[str, int]:
        plan = plan_in_force(self.graph.model)
        return plan.widths if plan is not None else {}

    def _measure(self, latency: Spread | None = None) -> Measurement:
        """Count the network as it is now, and time it unless its time is known."""
        network = self.graph.model.get_submodule(self.graph.module)
        return measure(network, self.graph.example_inputs, int(self.costs["flops"](self._widths)), latency)
