"""The survey of `plan`: many plans are made and measured on copies of a network, which itself is not pruned."""

import hashlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_prune.callbacks.batches import ValidationBatches, training_batches
from lightning_prune.callbacks.followers import NONE as NO_COPIES
from lightning_prune.cli.methods import DEFAULT, AtOnce
from lightning_prune.planning.in_turns import forward_times
from lightning_prune.planning.spread import ratios
from lightning_prune.progress import progress
from lightning_prune.reporting.survey import (
    Row,
    Survey,
    best_first,
    read_survey,
    same_settings,
    shown_metric,
    write_survey,
)

__all__ = ["PlannedOnce", "Surveyor", "place_of"]


def place_of(checkpoint: Path) -> Path:
    """Return where the survey of a checkpoint is kept: beside it."""
    return checkpoint.with_name(f"{checkpoint.stem}.plan.json")


class Surveyor(AtOnce):
    """Measure what each of some methods leaves at each of some budgets.

    Args:
        methods: Criteria, or ``"uniform"``.
        keeps: The budgets.
        path: The file that keeps what is measured.
        about: The class of the network, and the settings of the data.
        settings: As for `PruningCallback`.

    Attributes:
        survey: What was measured, also before.
        remark: What was not as expected of the file.
    """

    def __init__(
        self,
        methods: Sequence[str],
        keeps: Sequence[float],
        path: Path,
        about: tuple[str, dict[str, Any]],
        **settings: Any,
    ) -> None:
        super().__init__(DEFAULT, keep=1.0, **settings)
        self.methods = methods
        self.keeps = keeps
        self.path = path
        self.about = about
        self.asked = {**settings, "ignore": list(self.ignore)}
        self.survey: Survey | None = None
        self.remark = ""

    @override
    def work(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Measure what is not in the file yet, and write each network as it comes."""
        survey = self._begun(trainer)
        self.survey = survey
        self.run.step = 1
        count = str(self.validate_batches)
        if count not in survey.before:
            survey.before[count] = self.run.validator.now()
        missing = [
            (method, keep)
            for method in self.methods
            for keep in self.keeps
            if survey.row(method, keep, self.asked) is None
        ]
        with progress("Measuring plans", len(missing)) as bar:
            for method, keep in missing:
                survey.rows.append(self._measured(trainer, method, keep))
                write_survey(self.path, survey)
                bar.advance()

    def _begun(self, trainer: "pl.Trainer") -> Survey:
        """Return the survey in the file, if it is about this network and these data; otherwise begin one."""
        graph, costs = self.run.graph, self.run.recorder.costs
        model, data_settings = self.about
        new = Survey(
            model=model,
            weights=digest_of(trainer.lightning_module),
            data=digest_of_data(trainer),
            data_settings=data_settings,
            groups={name: group.channels for name, group in graph.groups.items()},
            flops=costs["flops"].original,
            params=costs["params"].original,
        )
        kept = read_survey(self.path)
        if kept is None:
            return new
        difference = kept.other_than(new)
        if not difference:
            return kept
        self.remark = f"{self.path} was about {difference}: all is measured anew."
        return new

    def _measured(self, trainer: "pl.Trainer", method: str, keep: float) -> Row:
        """Make a plan and measure it, or say why there is none."""
        started = time.perf_counter()
        self.use(method)
        row = Row(method, keep, self.asked)
        graph = self.run.graph
        try:
            scores = self._scores_of(trainer, method)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is kept is told of each row
                plan = self.allocate(graph, scores, keep)
            row.census = self.census
            row.metrics = self.run.validator.after(plan, self._compensations(plan, NO_COPIES))
        except ValueError as refusal:
            row.refusal = str(refusal)
            return row
        row.times = before, after = forward_times(graph, [{}, plan.widths], rounds=5, milliseconds=200)
        row.widths = {name: width * graph.groups[name].width for name, width in plan.widths.items()}
        costs = self.run.recorder.costs
        row.kept = {name: cost(plan.widths) / cost.original for name, cost in costs.items()}
        row.kept["latency"] = ratios(after, before).median
        if self.metric == "latency":
            row.kept["latency"] = (plan.budget or {})["achieved"]
        row.flops, row.params = costs["flops"](plan.widths), costs["params"](plan.widths)
        row.seconds = time.perf_counter() - started
        return row

    def _scores_of(self, trainer: "pl.Trainer", method: str) -> dict[str, Tensor]:
        """Return the scores of a method, which are the same for all budgets."""
        if self._scored[0] != method:
            self._scored = method, self.scores(trainer, self.run.graph)
        return self._scored[1]

    _scored: tuple[str, dict[str, Tensor]] = "", {}


class PlannedOnce(AtOnce):
    """Prune by the method that a survey has found best.

    Args:
        path: The file of the survey; there may be none.
        data_settings: The settings of the data.
        settings: As for `PruningCallback`.

    Attributes:
        why: Why it is this method.
    """

    def __init__(self, path: Path, data_settings: dict[str, Any], **settings: Any) -> None:
        super().__init__(DEFAULT, **settings)
        self.path = path
        self.data_settings = data_settings
        self.asked = {**settings, "ignore": list(self.ignore)}
        self.asked.pop("keep")
        self.why = "the default; lightning-prune plan --method all measures which is best here"

    @override
    def work(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Choose the method, and prune by it."""
        survey = read_survey(self.path)
        if survey is not None:
            self._choose(trainer, survey)
        super().work(trainer, pl_module)

    def _choose(self, trainer: "pl.Trainer", survey: Survey) -> None:
        now = (digest_of(trainer.lightning_module), digest_of_data(trainer), self.data_settings)
        if now != (survey.weights, survey.data, survey.data_settings):
            self.why = f"the default: {self.path} is about other weights or data"
            return
        rows = [row for row in survey.rows if same_settings(row.settings, self.asked) and row.metrics]
        if not rows:
            self.why = f"the default: {self.path} has no network with these settings"
            return
        nearest = min((abs(row.keep - self.keep), row.keep) for row in rows)[1]
        compared = [row for row in rows if row.keep == nearest]
        best = best_first(compared)[0]
        self.use(best.method)
        self.why = f"best in {shown_metric(compared)} of {len(compared)} at keep {nearest:g} in {self.path}"


# -- what a survey is about --------------------------------------------------------------------------------------------


def digest_of(model: nn.Module) -> str:
    """Return a digest of the weights of a model, by their names."""
    weights = model.state_dict()
    return _digest([part for name in sorted(weights) for part in (name, weights[name])])


def digest_of_data(trainer: "pl.Trainer") -> str:
    """Return a digest of a training batch and a validation batch, and of how many there are."""
    training = training_batches(trainer, 1, seed=0, of_all_ranks=True)
    validation = ValidationBatches(trainer, None, "plan")
    first = next(iter(validation), None)
    return _digest([trainer.num_training_batches, validation.count, *tree_leaves([training, first])])


def _digest(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()
