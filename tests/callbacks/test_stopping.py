"""Stopping by accuracy: prunes go on while a metric stays within a drop, and the one too many is taken back."""

import copy
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

import lightning_prune as lp
from lightning_prune.callbacks import (
    LearnToPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    SensitivenessCallback,
    TaylorRankCallback,
)
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.report import render

# What the metric is after each epoch: the third prune, before epoch 3, is one too many.
VALUES = [0.75, 0.875, 0.8125, 0.5, 0.75, 0.75]


class Told(battery.ResidualClassifier):
    """Says what its metric is after each epoch."""

    values = VALUES

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        epochs = self.trainer.global_step // battery.BATCHES
        self.log("val/told", self.values[max(epochs, 1) - 1])


class Seen(L.Callback):
    """Keep network and optimizer as they are at the start of each epoch before anything else, and after each."""

    def __init__(self) -> None:
        self.after: dict[int, Any] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.after[trainer.current_epoch] = copy.deepcopy(pl_module), state


class Start(L.Callback):
    """Keep network and optimizer at the start of an epoch, after the pruning callback has done what it does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
            self.module = copy.deepcopy(pl_module)
            self.live = [id(each) for each in trainer.optimizers[0].param_groups[0]["params"]]
            self.parameters = [id(each) for each in pl_module.parameters()]


def stopping(kind: type[PruningCallback] = PruningCallback, **settings: Any) -> PruningCallback:
    usual: dict[str, Any] = {"max_drop": 0.0625, "monitor": "val/told", "step_keep": 0.75, "round_to": 2}
    plain = {"criterion": "l1", "compensate": "none"} if kind is PruningCallback else {}
    return kind(**{**usual, **plain, "validate_batches": 0, **settings})


def train(root: Path, callback: PruningCallback, *others: L.Callback, **settings: Any) -> tuple[Any, L.Trainer]:
    module = settings.pop("module", None) or Told()
    return battery.train(root, callback, *others, module=module, max_epochs=6, **settings)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("kind", [PruningCallback, TaylorRankCallback])
def test_the_prune_too_many_is_taken_back_to_the_bit(kind: type[PruningCallback], tmp_path: Path) -> None:
    callback, seen, start = stopping(kind), Seen(), Start(4)
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1, monitor="val/told", mode="max")
    module, trainer = train(tmp_path, callback, seen, start, saver)
    before, state = seen.after[2]  # after two prunes; the third was made before epoch 3
    assert plan_in_force(seen.after[3][0]).widths != plan_in_force(before).widths
    assert battery.differences(start.module, before) == []
    assert same(start.state, state)
    assert start.live == start.parameters
    assert plan_in_force(module) == plan_in_force(start.module) == plan_in_force(before)
    assert (callback.steps_done, callback.state.stop.over, callback.is_complete) == (2, True, True)
    history = callback.history
    assert [(each.step, each.epoch, each.until) for each in history.taken_back] == [(3, 3, 4)]
    assert [prune.step for prune in history.prunes] == [1, 2]
    assert history.widths == plan_in_force(module).widths
    assert history.after.params == sum(each.numel() for each in module.parameters())
    assert history.epochs[-1]["keep_flops"] == history.epochs[2]["keep_flops"] > history.epochs[3]["keep_flops"]
    assert "taken back: prune 3" in render([history], "runs/1")
    loaded = lp.load_pruned(Told, callback.result_path)
    assert battery.differences(loaded, module) == []
    assert trainer.checkpoint_callback.best_model_score == 0.75  # of the epochs since it went back


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (PruningCallback, ["average"]),
        pytest.param(TaylorRankCallback, [], marks=pytest.mark.long),
    ],
)
def test_stopped_equals_unbroken(kind: type[PruningCallback], others: list[str], tmp_path: Path) -> None:
    def made() -> list[L.Callback]:
        return [EMAWeightAveraging(decay=0.5) for _ in others]

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step:02d}", save_top_k=-1, every_n_train_steps=3)
    unbroken, trainer = train(tmp_path, stopping(kind), saver, *made())
    averages = [average._average_model.module for average in trainer.callbacks if hasattr(average, "_average_model")]
    paths = sorted((tmp_path / "steps").glob("*.ckpt"))
    assert len(paths) == 12
    some = paths[3:9] if others else paths[2:]  # from right before the judgement to after the network went back
    for path in some:
        resumed, trainer = train(tmp_path / path.stem, stopping(kind), *made(), ckpt_path=path)
        assert battery.differences(unbroken, resumed) == [], path.name
        others_now = [each._average_model.module for each in trainer.callbacks if hasattr(each, "_average_model")]
        for one, other in zip(averages, others_now, strict=True):
            assert battery.differences(one, other) == [], path.name


@pytest.mark.filterwarnings("ignore:PruningCallback could prune nothing", "ignore:PruningCallback prunes no further")
@pytest.mark.parametrize(
    ("values", "settings", "steps"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.25], {}, 4),  # the last prune is judged at the end: one of five stays out
        ([0.5, 0.25, 0.5, 0.5, 0.5, 0.5], {}, 0),  # the first is one too many
        ([0.5, 0.25, 0.5, 0.5, 0.5, 0.5], {"keep": [0.25, 0.5]}, 1),  # but was asked for
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], {"keep": 0.5}, 3),  # 0.75, 0.5625, 0.5
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], {"keep": [0.25, 0.5], "metric": "channels", "round_to": 1}, 4),
        ([0.5, 0.25, 0.5, 0.5, 0.5, 0.5], {"every_n_epochs": 2}, 2),  # recovered after two; a third would end too late
        ([0.5, 0.5, 0.5, float("nan"), 0.5, 0.5], {}, 2),  # no number is within nothing
        ([0.5, 0.5, 0.5625, 0.625, 0.5, 0.5], {"mode": "min"}, 2),
    ],
)
def test_how_far_it_goes(
    values: list[float], settings: dict[str, Any], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "values", values)
    callback = stopping(**settings)
    module, _ = train(tmp_path, callback)
    assert callback.steps_done == steps
    plan = plan_in_force(module)
    assert (plan is None) == (steps == 0)
    if plan is not None:
        assert plan.budget["achieved"] <= callback.keep_after(steps)
        assert callback.history.prunes[-1].widths == plan.widths
    assert callback.state.stop.snapshot == {}


def test_what_ends_beyond_the_drop_goes_back_to_what_was_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "values", [*VALUES[:5], 0.25])
    callback, seen = stopping(), Seen()
    module, _ = train(tmp_path, callback, seen)
    assert battery.differences(module, seen.after[2][0]) == []
    assert battery.differences(lp.load_pruned(Told, callback.result_path), module) == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no monitor": ({"monitor": None}, r"has max_drop=0.0625 and no monitor to go by; give max_drop with monitor, such"),
    "not logged": ({"monitor": "val/acc"}, r"monitor='val/acc' is not among what validation logs: .*'val/told'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_pruned(name: str, tmp_path: Path) -> None:
    settings, told = WRONG[name]
    callback = stopping(**settings)
    with pytest.raises(ValueError, match=told):
        train(tmp_path, callback, num_sanity_val_steps=2)
    assert callback.steps_done == 0


def test_runs_in_which_it_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which no validation measures: give the run a validation_step"):
        train(tmp_path, stopping(), limit_val_batches=0)
    with pytest.raises(ValueError, match=r"the run ends after 6 epochs; raise max_epochs to at least 8, or lower"):
        train(tmp_path, stopping(start_epoch=4, every_n_epochs=4))
    with pytest.raises(ValueError, match="no other callback can prune beside it; use one pruning callback"):
        train(tmp_path, stopping(module="stem"), PruningCallback(module="first"))
    with pytest.raises(ValueError, match=r"The budget .* cannot|can stay|reach"):
        train(tmp_path, stopping(keep=[0.001, 0.002], round_to=8))


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (PruningCallback, {"max_drop": -1}, "max_drop must be a number of at least 0"),
        (PruningCallback, {"max_drop": float("nan")}, "max_drop must be a number of at least 0"),
        (PruningCallback, {"max_drop": None}, "monitor='val/told' says when to stop only with max_drop"),
        (PruningCallback, {"max_drop": None, "monitor": None, "keep": [0.2, 0.5]}, "does not say how far to prune"),
        (PruningCallback, {"keep": [0.5, 0.2]}, "keep must name the lesser fraction first"),
        (PruningCallback, {"keep": [0.5, 2.0]}, "above 0 and at most 1"),
        (PruningCallback, {"keep": [0.1, 0.2, 0.3]}, "keep must be one fraction, or the least and the greatest"),
        (PruningCallback, {"mode": "best"}, "mode must be 'max' or 'min'"),
        (PruningCallback, {"step_keep": 1.0}, "step_keep must be what a prune keeps, above 0 and below 1"),
        (PruningCallback, {"steps": 3}, "steps=3 and max_drop both say how many prunes there are"),
        (PruningCallback, {"start_epoch": 0}, "start_epoch must be at least 1"),
        (RLJointPruneCallback, {}, "chooses one network for one budget and knows no max_drop"),
        (LearnToPruneCallback, {}, "chooses one network for one budget and knows no max_drop"),
    ],
)
def test_wrong_settings_are_refused(
    kind: type[PruningCallback], settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        stopping(kind, **settings)


def test_what_it_measures_layers_by_may_be_what_it_stops_by(tmp_path: Path) -> None:
    callback = stopping(SensitivenessCallback, monitor="val/accuracy", max_drop=1.0, levels=[0.5], draws=1, keep=0.6)
    module, _ = train(tmp_path, callback)
    assert plan_in_force(module).budget["achieved"] <= 0.6


def test_a_try_out_prunes_once(tmp_path: Path) -> None:
    callback = stopping()
    module, _ = train(tmp_path, callback, fast_dev_run=2)
    assert plan_in_force(module).budget["asked"] == 0.75
