"""Validation around a prune: what the module's own validation says of the network before, and right after.

The validation step runs on copies of the module: of the network as it is, of the pruned one, and of the compensated
one, all before the module itself is pruned. What they log is kept, and goes to no logger.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_prune.callbacks.batches import ValidationBatches, gives_samples
from lightning_prune.callbacks.ranks import decided_by_first_rank
from lightning_prune.callbacks.rehearsal import VALIDATION, Rehearsal, let_log, quietened
from lightning_prune.callbacks.trainer_state import averaged_copies, is_validation_metric
from lightning_prune.callbacks.trial_run import never_validates
from lightning_prune.compiled import as_written
from lightning_prune.graph.twin import refusing_calls, set_mode, twin_in_evaluation
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.reporting.history import MetricsAround
from lightning_prune.reporting.loggers import warn
from lightning_prune.surgery import pruned
from lightning_prune.surgery.compensation import Compensation
from lightning_prune.surgery.replacing import in_place

__all__ = ["Validator"]

Metrics: TypeAlias = dict[str, float]
Logged: TypeAlias = dict[str, tuple[float, float]]  # sum over samples and their number, by name


class Validator:
    """Runs the module's own validation on some batches of the validation split, without a trace.

    All ranks call its methods alike, and get the same numbers. Where weights are averaged, the average is validated, as
    Lightning does. Where that cannot be done (no validation step, no samples that can be asked for), nothing is told.

    Args:
        trainer: The trainer.
        count: Number of validation batches on each rank; 0 for none.
    """

    def __init__(self, trainer: "pl.Trainer", count: int) -> None:
        self._trainer = trainer
        self._count = count
        self._works = count > 0 and not never_validates(trainer)

    def around(self, plan: PruningPlan, compensations: Sequence[Compensation]) -> MetricsAround:
        """Return the metrics before a prune that is about to be made, and those after it.

        Args:
            plan: The channels that are kept.
            compensations: How the module, and each averaged copy, makes up for it; none if they do not.
        """
        with progress(f"Validating {type(self._trainer.lightning_module).__name__}"):
            before = self.now()
            after = self._validated(plan)
            uncompensated: Metrics = {}
            if compensations:
                uncompensated, after = after, self.after(plan, compensations)
        return MetricsAround(before=before, uncompensated=uncompensated, after=after)

    def now(self) -> Metrics:
        """Return the metrics of the network as it is."""
        return self._validated()

    def after(self, plan: PruningPlan, compensations: Sequence[Compensation]) -> Metrics:
        """Return the metrics of the network as it would be after a prune.

        Args:
            plan: The channels that are kept.
            compensations: As for `around`.
        """
        index = 1 if averaged_copies(self._trainer) else 0  # of the module first, then of the averages
        return self._validated(plan, compensations[index] if compensations else None)

    def _validated(self, plan: PruningPlan | None = None, compensation: Compensation | None = None) -> Metrics:
        if not self._works:
            return {}
        of_ranks = _of_all_ranks(self._tried(plan, compensation))
        failures = [result for result in of_ranks if isinstance(result, str)]
        if not failures:
            return _means([result for result in of_ranks if not isinstance(result, str)])
        self._works = False
        module = type(self._trainer.lightning_module).__name__
        warn(
            f"The validation metrics right before and right after prunes are not told: the validation of {module} "
            f"fails on a copy of it, with {failures[0]} Set validate_batches=0 to do without."
        )
        return {}

    def _tried(self, plan: PruningPlan | None, compensation: Compensation | None) -> Logged | str:
        """Return what is logged on this rank, or what failed: a rank that fails may not let the others wait."""
        try:
            batches = ValidationBatches(self._trainer, self._count, type(self).__name__)
            if not gives_samples(batches.loader):  # a stream would lose them
                return {}
            with self._copied(plan, compensation) as model:
                return _Run(self._trainer, model).logged(batches)
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"

    @contextmanager
    def _copied(self, plan: PruningPlan | None, compensation: Compensation | None) -> Iterator[nn.Module]:
        """Make a copy of what is validated, pruned and compensated if asked for; no rank has statistics of its own."""
        copies = averaged_copies(self._trainer)
        model = copies[0] if copies else self._trainer.lightning_module
        several = self._trainer.world_size > 1
        statistics = decided_by_first_rank(self._trainer, lambda: _buffers(model)) if several else {}
        with twin_in_evaluation(model) as twin, refusing_calls(model), torch.no_grad(), as_written():
            for name, buffer in twin.model.named_buffers():
                buffer.copy_(statistics.get(name, buffer))
            if plan is None:
                yield twin.model
                return
            with pruned(twin.model, plan):
                replacements = compensation.replacements(twin.model) if compensation is not None else ()
                with in_place(list(replacements)):
                    yield twin.model


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}


def _of_all_ranks(result: Logged | str) -> list[Logged | str]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [result]
    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, result)
    return of_ranks


def _means(of_ranks: Iterable[Logged]) -> Metrics:
    """Return the means over all ranks."""
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for logged in of_ranks:
        for name, (total, weight) in logged.items():
            sums[name] += total
            weights[name] += weight
    return {name: sums[name] / weights[name] for name in sorted(sums) if weights[name]}


# -- one validation ----------------------------------------------------------------------------------------------------


class _Run:
    """One validation of a copy of the module.

    Args:
        trainer: The trainer.
        model: The copy, in evaluation mode.
    """

    def __init__(self, trainer: "pl.Trainer", model: Any) -> None:
        self._trainer = trainer
        self._model = model
        self._rehearsal = Rehearsal(trainer, trainer.lightning_module)
        several = len(tree_leaves(trainer.val_dataloaders)) > 1
        self._logged = _Log("/dataloader_idx_0" if several else "")

    def logged(self, batches: ValidationBatches) -> Logged:
        """Return what is logged on this rank."""
        self._put_aside()
        model = self._model
        with self._trainer.precision_plugin.val_step_context():
            model.on_validation_start()
            model.on_validation_epoch_start()
            for number, batch in enumerate(batches):
                self._logged.begin(batch)
                model.on_validation_batch_start(batch, number)
                output = model.validation_step(*self._arguments(batch, number))
                model.on_validation_batch_end(output, batch, number)
            self._logged.begin(None)
            model.on_validation_epoch_end()
            return self._logged.totals_and_weights()

    def _put_aside(self) -> None:
        """Let the copy log here, and see no logger."""
        quietened(self._trainer, self._model)
        set_mode(self._model, training=False)
        for module in self._model.modules():
            if isinstance(module, Metric):
                module.reset()
        let_log(self._model, self._logged.log)

    def _arguments(self, batch: Any, number: int) -> tuple[Any, ...]:
        """Return what the validation step is given: the batch, its number and that of its loader, if asked for."""
        step = self._rehearsal.step(VALIDATION, batch)
        if step is None:
            raise TypeError("it draws its batches by itself.")
        further = (number, 0)[: len(step.args) - 1]
        return (batch, *further)


@dataclass
class _Log:
    """What a validation logs, as sums and weights over its batches.

    Attributes:
        suffix: What comes behind names, where there are several loaders.
        samples: Number of samples in the batch.
    """

    suffix: str
    samples: int = 1
    totals: dict[str, list[tuple[Any, float]]] = field(default_factory=lambda: defaultdict(list))
    computed: dict[str, Metric] = field(default_factory=dict)

    def begin(self, batch: Any) -> None:
        """Note whose metrics are logged from now on: those of a batch, or of all of them."""
        lengths = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
        self.samples = lengths[0] if lengths else 1

    def log(
        self, name: str, value: Any, *_: Any, on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean", add_dataloader_idx: bool = True,
        batch_size: int | None = None, **__: Any,
    ) -> None:  # fmt: skip
        """Take what ``self.log`` of a module is given; only means over an epoch are of use."""
        if not is_validation_metric(name) or on_epoch is False:
            return
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self.computed[name] = value
        elif reduce_fx in ("mean", torch.mean):
            number = value.detach().double() if isinstance(value, Tensor) else value
            self.totals[name].append((number, batch_size or self.samples))

    def totals_and_weights(self) -> Logged:
        """Return the sum and the weight of each metric."""
        found = {name: (float(metric.compute()), 1.0) for name, metric in self.computed.items()}
        for name, logged in self.totals.items():
            total = sum(float(value) * weight for value, weight in logged)
            found[name] = total, float(sum(weight for _, weight in logged))
        return found
