"""A trial run, by ``fast_dev_run=2``, refuses what the run itself would refuse, and nothing else."""

import ast
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import lightning_prune.callbacks
from lightning_prune.callbacks import (
    LearnToPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    SensitivenessCallback,
    TaylorRankCallback,
)
from lightning_prune.pruning_plan import plan_in_force

Small = battery.ResidualClassifier


class ByHand(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Aside(Small):
    """Trains a layer beside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(1, 1)
        self.spare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.aside(torch.ones(1)).sum()


class Words(Small):
    def forward(self, images: Tensor) -> Any:
        super().forward(images)
        return "words"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(super().forward(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", super().forward(batch[0]).mean())


class Frames(Words):
    def forward(self, images: Tensor) -> Any:
        return super(Words, self).forward(images)[:, None]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, 0], batch[1])


class One(Frames):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[:, 0, :1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()


class Unmeasured(Small):
    """Has a validation step only where one is looked for by name."""

    validation_step = L.LightningModule.validation_step


class Regression(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/square", self(batch[0]).pow(2).mean())


class Silent(Small):
    """Has an average that no step shows to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        self.averages = [AveragedModel(self.body)]

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images.flatten(1))


class Exploding(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * math.nan


class Roundabout(Unmeasured):
    """Takes steps in training alone, and not by its ``forward``."""

    def forward(self, images: Tensor, flag: bool) -> Tensor:
        return super().forward(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.training
        return F.cross_entropy(super().forward(batch[0]), batch[1])


def by_accuracy(**settings: Any) -> PruningCallback:
    return PruningCallback(**{"max_drop": 0.1, "monitor": "val/accuracy", "round_to": 2, **settings})


@dataclass
class Refused:
    """A run, and how what is said of it begins."""

    says: str
    callbacks: list[Any]
    module: Any = Small
    trainer: dict[str, Any] | None = None
    error: type[Exception] = ValueError

    def fit(self, root: Path, **trainer: Any) -> Any:
        made = [callback() for callback in self.callbacks]
        return battery.train(root, *made, module=self.module, **{**(self.trainer or {}), **trainer})


def one(says: str, make: Any, *args: Any, **settings: Any) -> list[Refused]:
    return [Refused(says, [make], *args, **settings)]


# Where something is refused, and runs that it is refused in.
WITHIN_A_RUN: dict[str, list[Refused]] = {
    "base.PruningCallback._trace": one("PruningCallback finds nothing to prune", lambda: PruningCallback(ignore="*")),
    "batches.ValidationBatches.__init__": [
        Refused("SensitivenessCallback measures on the", [SensitivenessCallback], trainer={"limit_val_batches": 0}),
        Refused(
            "RLJointPruneCallback measures on the",
            [lambda: RLJointPruneCallback(start_epoch=2, warmup_epochs=0)], trainer={"limit_val_batches": 0.0},
        ),
        Refused("LearnToPruneCallback measures on the", [LearnToPruneCallback], trainer={"limit_val_batches": 0}),
    ],
    "distilling.logits_of": [
        Refused("distill", [lambda: PruningCallback(distill=True)], Words),
        Refused("The network returns logits of shape", [lambda: PruningCallback(distill=True)], Frames),
        Refused("distill", [lambda: PruningCallback(distill=True)], One),
    ],
    "distilling.Distiller.check": one("distill joins the one loss", lambda: PruningCallback(distill=True), ByHand),
    "distilling.Distiller.join": one("distill", lambda: PruningCallback(distill=True), Aside),
    "example_inputs._really_given": one(
        "No example input of 'spare' is to be had", lambda: PruningCallback(module="spare"), Aside
    ),
    "monitoring._Monitored.__call__": one(
        "monitor='val/x' is not among what", lambda: SensitivenessCallback(monitor="val/x")
    ),
    "monitoring._refuse_unused_labels": one("Regression does not learn from", SensitivenessCallback, Regression),
    "prune_batches.PruneBatches._try": one(
        "compensate='refit' runs Roundabout on training batches, which fails with",
        lambda: PruningCallback(
            compensate="refit", example_inputs={"images": torch.zeros(1, 1, 8, 8), "flag": True}
        ),
        Roundabout,
    ),
    "refusals.refuse_other_callbacks": [
        Refused("StochasticWeightAveraging keeps", [lambda: StochasticWeightAveraging(swa_lrs=0.1), PruningCallback])
    ],
    "refusals.refuse_alike": [Refused("Two callbacks PruningCallback prune", [PruningCallback, PruningCallback])],
    "refusals._refuse_overlap": [
        Refused("PruningCallback and TaylorRankCallback both prune", [PruningCallback, TaylorRankCallback]),
        Refused(
            "PruningCallback and TaylorRankCallback both have distill",
            [lambda: PruningCallback(distill=True), lambda: TaylorRankCallback(distill=True)],
        ),
    ],
    "refusals.refuse_short_run": [
        Refused("PruningCallback prunes before epochs 5 to 5", [lambda: PruningCallback(start_epoch=5)]),
        Refused("TaylorRankCallback prunes before", [lambda: TaylorRankCallback(steps=3, every_n_epochs=4)]),
        Refused("PruningCallback prunes before epoch 3", [lambda: by_accuracy(start_epoch=3, every_n_epochs=3)]),
    ],
    "refusals.refuse_few_steps": [
        Refused(
            "PruningCallback prunes before epoch 3 (counted from 0), but the run ends after 18 steps, of which an "
            "epoch takes 6; raise max_steps to at least 19",
            [lambda: PruningCallback(steps=3)], trainer={"max_epochs": -1, "max_steps": 18},
        ),
        Refused(
            "PruningCallback prunes before epoch 2 (counted from 0), but the run ends after 6 steps, of which an epoch "
            "takes 3; raise max_steps to at least 7",
            [lambda: PruningCallback(start_epoch=2)],
            trainer={"max_steps": 6, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        ),
        Refused(
            "PruningCallback prunes before epoch 1 (counted from 0), but the run ends after 11 steps, of which an "
            "epoch takes 3; raise max_steps to at least 12",
            [lambda: by_accuracy(every_n_epochs=3)], trainer={"max_steps": 11, "limit_train_batches": 0.5},
        ),
    ],
    "refusals.refuse_averaged_models": one("'averages' of Silent averages", PruningCallback, Silent),
    "runtimes._content": one(
        "", lambda: PruningCallback(metric="latency", runtime="nowhere.json"), error=Exception
    ),
    "stopping.check_start": [
        Refused("PruningCallback has max_drop=0.1 and no monitor", [lambda: by_accuracy(monitor=None)]),
        Refused(
            "PruningCallback goes by 'val/accuracy', which no", [by_accuracy], trainer={"limit_val_batches": 0}
        ),
        Refused("PruningCallback goes by 'val/accuracy', which no", [by_accuracy], Unmeasured),
        Refused(
            "PruningCallback with max_drop goes back",
            [lambda: by_accuracy(module="stem"), lambda: TaylorRankCallback(module="first")],
        ),
    ],
    "stopping.note_validation": one("monitor='val/x' is not among what", lambda: by_accuracy(monitor="val/x")),
    "taylor.TaylorRankCallback._refuse_unseen": one(
        "TaylorRankCallback has seen no gradients", TaylorRankCallback, Aside
    ),
    "taylor.TaylorRankCallback.scores": one(
        "TaylorRankCallback has seen no finite gradients", TaylorRankCallback, Exploding, error=RuntimeError
    ),
}  # fmt: skip
BY_CONSTRUCTOR = "the constructor of the callback refuses it"
IN_SETUP = "setup refuses it, of every Trainer alike; see test_wrong_uses.py"
ON_RESUMING = "Lightning tries out no run that is resumed: there, the epoch of the checkpoint is past the end"
ON_RANKS = "ranks that differ, of every Trainer alike"
CAUGHT = "caught where it is called, and no refusal"
ELSEWHERE: dict[str, str] = {
    "base.PruningCallback.check_criterion": BY_CONSTRUCTOR,
    "base.PruningCallback._check_ranking": BY_CONSTRUCTOR,
    "base.PruningCallback.checked_blocks": BY_CONSTRUCTOR,
    "base._check_compensate": BY_CONSTRUCTOR,
    "batches.check_limit": BY_CONSTRUCTOR,
    "descriptions._described": CAUGHT,
    "distilling.Distill.__post_init__": BY_CONSTRUCTOR,
    "distilling.distill_settings": BY_CONSTRUCTOR,
    "distilling.Distiller.teach_with": ON_RESUMING,
    "learn_to_prune.LearnToPruneCallback.__init__": BY_CONSTRUCTOR,
    "learn_to_prune.LearnToPruneCallback._copy": "test_wrong_uses.py has it, and tries it out",
    "monitoring.check_measure": BY_CONSTRUCTOR,
    "monitoring.check_candidates": BY_CONSTRUCTOR,
    "monitoring.measure_in": "a run without validation_step has no validation batches, which is refused before",
    "plan_checkpoint_io.PlanCheckpointIO.__getattr__": CAUGHT,
    "plan_checkpoint_io._Restoring.load_state_dict": ON_RESUMING,
    "prune_batches.PruneBatches.try_out": "hands on what _find_a_way raises",
    "prune_batches.PruneBatches._find_a_way": "hands on what _try raises",
    "prune_batches.PruneBatches._as_training_calls": CAUGHT,
    "prune_batches.PruneBatches._step": CAUGHT,
    "ranks.decided_by_first_rank": "hands on what the first rank raises",
    "ranks.agreed_plan": ON_RANKS,
    "refusals.refuse_pruned_blocks": "test_wrong_uses.py has it, and tries it out",
    "refusals.refuse_strategy": IN_SETUP,
    "refusals._refuse_another_version": IN_SETUP,
    "rehearsal.Rehearsal.entry": "test_wrong_uses.py has it for data in words",
    "resuming.tell_what_holds": ON_RESUMING,
    "rl_joint.RLJointPruneCallback.__init__": BY_CONSTRUCTOR,
    "rl_joint.RLJointPruneCallback.check_criterion": BY_CONSTRUCTOR,
    "rl_joint.RLJointPruneCallback.prepare": ON_RESUMING,
    "runtimes.check_runtime": BY_CONSTRUCTOR,
    "schedule.check_whole_number": BY_CONSTRUCTOR,
    "sensitiveness.SensitivenessCallback.__init__": BY_CONSTRUCTOR,
    "settings._refuse_difference": ON_RANKS,
    "stopping.check_settings": BY_CONSTRUCTOR,
    "stopping._check_range": BY_CONSTRUCTOR,
    "taylor.TaylorRankCallback.__init__": BY_CONSTRUCTOR,
    "validating._Run._arguments": CAUGHT,
}  # fmt: skip
RUNS = [(place, number) for place, runs in WITHIN_A_RUN.items() for number in range(len(runs))]


def raising(node: ast.AST, name: str) -> Iterator[str]:
    """Yield the names of the functions in which something is raised."""
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else name
        if isinstance(child, ast.Raise):
            yield name
        yield from raising(child, inner)


def test_nothing_is_refused_that_is_not_here() -> None:
    (folder,) = lightning_prune.callbacks.__path__
    found = {place for path in Path(folder).glob("*.py") for place in raising(ast.parse(path.read_text()), path.stem)}
    assert found == WITHIN_A_RUN.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize(("place", "number"), RUNS)
def test_a_trial_run_finds_what_a_run_refuses(place: str, number: int, tmp_path: Path) -> None:
    refused = WITHIN_A_RUN[place][number]
    with pytest.raises(refused.error, match="^" + re.escape(refused.says)) as trial:
        refused.fit(tmp_path, fast_dev_run=2)
    names = [entry.name for entry in trial.traceback]
    assert place.rpartition(".")[2] in names or "decided_by_first_rank" in names


@pytest.mark.long
@pytest.mark.parametrize(("place", "number"), RUNS)
def test_a_run_refuses_it_in_the_same_words(place: str, number: int, tmp_path: Path) -> None:
    refused = WITHIN_A_RUN[place][number]
    said = []
    for settings in ({"fast_dev_run": 2}, {}):
        with pytest.raises(refused.error) as error:
            refused.fit(tmp_path, **settings)
        said.append(re.sub(r"epoch \d+: |\d+ of \d+ steps", "", str(error.value)))  # which a trial has fewer of
    assert said[0] == said[1]


class Transfer(Small):
    """A head on a backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.top(self.backbone(images.flatten(1)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2)


def taylor(start_epoch: int) -> TaylorRankCallback:
    return TaylorRankCallback(start_epoch=start_epoch, variant="gate", round_to=1)


# Runs that end well, and at their bounds.
LET_THROUGH: dict[str, Refused] = {
    "as many epochs as it takes": Refused("", [lambda: PruningCallback(start_epoch=4, round_to=2)]),
    "any number of epochs": Refused(
        "", [lambda: PruningCallback(start_epoch=4, round_to=2)], trainer={"max_epochs": -1, "max_steps": 30}
    ),
    "as many steps as it takes": Refused(
        "", [lambda: PruningCallback(start_epoch=2, round_to=2)], trainer={"max_steps": 13, "max_epochs": -1}
    ),
    "steps that nobody counts": Refused(
        "", [lambda: PruningCallback(start_epoch=2, round_to=2), lambda: GradientAccumulationScheduler({1: 6})],
        trainer={"max_steps": 8, "max_epochs": -1},
    ),
    "overfitting": Refused(
        "", [lambda: by_accuracy(max_drop=2.0)], trainer={"overfit_batches": 2, "limit_val_batches": 0}
    ),
    "thawed before": Refused("", [lambda: taylor(3), lambda: BackboneFinetuning(2, verbose=True)], Transfer),
}  # fmt: skip


FINE = pytest.mark.filterwarnings("ignore:.*of the flops is kept", "ignore:Prune . of .")


@FINE
@pytest.mark.parametrize("use", LET_THROUGH)
def test_a_trial_run_refuses_nothing_else(use: str, tmp_path: Path) -> None:
    module, _ = LET_THROUGH[use].fit(tmp_path, fast_dev_run=2)
    assert plan_in_force(module) is not None


@FINE
@pytest.mark.long
@pytest.mark.parametrize("use", LET_THROUGH)
def test_nor_does_the_run(use: str, tmp_path: Path) -> None:
    module, _ = LET_THROUGH[use].fit(tmp_path)
    assert plan_in_force(module) is not None


def test_a_prune_before_what_it_looks_at_is_thawed_is_refused_at_the_start(tmp_path: Path) -> None:
    run = Refused("", [lambda: taylor(2), lambda: BackboneFinetuning(2)], Transfer)
    said = "has seen no gradients of 'backbone.0' in a training step .* raise start_epoch"
    with pytest.raises(ValueError, match=said):
        run.fit(tmp_path)


class FollowsLate(battery.MomentumClassifier):
    """Its average follows it from the third epoch on; until then it could be a teacher."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch >= 2:
            return super().training_step(batch, batch_idx)
        return battery.Classifier.training_step(self, batch, batch_idx)


def test_a_trial_run_finds_what_follows_in_later_epochs(tmp_path: Path) -> None:
    callback = PruningCallback(round_to=2, compensate_batches=2)
    module, _ = battery.train(tmp_path, callback, module=FollowsLate, fast_dev_run=2)
    shapes = [[p.shape for p in part.parameters()] for part in (module.momentum, module.online, FollowsLate().online)]
    assert shapes[0] == shapes[1] != shapes[2]


def test_a_trainer_that_was_made_before_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forget(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            vars(trainer).pop("_lightning_prune_settings")

    with caplog.at_level("INFO"):
        battery.train(tmp_path, Forget(), PruningCallback(start_epoch=9, round_to=2), fast_dev_run=2)
    assert "whether the schedule of PruningCallback fits into max_epochs" in caplog.text


def test_what_callbacks_look_at_and_nobody_logs_is_told(tmp_path: Path) -> None:
    savers = [
        ModelCheckpoint(tmp_path, monitor="val/accuracy"),
        ModelCheckpoint(tmp_path, monitor="val/x", save_last=True),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        battery.train(tmp_path, battery.make_callback("magnitude"), EarlyStopping("train/y"), *savers, fast_dev_run=2)
    told = [str(warning.message) for warning in caught if "in this trial run" in str(warning.message)]
    assert [text.partition(", which")[0] for text in told] == [
        "EarlyStopping goes by 'train/y'", "ModelCheckpoint goes by 'val/x'"
    ]  # fmt: skip
    assert "'train/loss', 'val/accuracy'" in told[0]


class Unwritable(Small):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise RuntimeError("no more of this")


def test_a_result_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    with pytest.warns(UserWarning, match=r"The pruned network could not be written to .* \(no more of this\)"):
        battery.train(tmp_path, callback, module=Unwritable, fast_dev_run=2)
    assert callback.result_path == ""
    assert list(tmp_path.iterdir()) == []
