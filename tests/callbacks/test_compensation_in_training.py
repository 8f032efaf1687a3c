"""Compensation as a setting of the callbacks: what is kept makes up for each prune, before training goes on."""

import copy
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, compensation_step, prune_batches, surgery_step
from lightning_prune.callbacks.batches import training_batches
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.history import History, read_histories
from lightning_prune.unlabelled import run_forward

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # prunes nothing, in steps of two channels
ONE_PRUNE: dict[str, Any] = {
    "keep": 0.5,
    "start_epoch": 1,
    "round_to": 2,
    "criterion": "l1",
    "compensate_batches": 2,
}


class Around(L.Callback):
    """Note module, average and optimizer right before and after the prune, in front of and behind the callback."""

    def __init__(self, average: EMAWeightAveraging | None = None) -> None:
        self.average = average
        self.noted: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        of_parameters = trainer.optimizers[0].state
        state = {name: copy.deepcopy(of_parameters[value]) for name, value in pl_module.named_parameters()}
        self.noted.append(
            {
                "module": copy.deepcopy(pl_module),
                "average": copy.deepcopy(self.average._average_model.module) if self.average else None,
                "state": state,
                "random": torch.get_rng_state(),
                "batches": [batch[0] for batch in training_batches(trainer, 2, seed=1)],
            }
        )


def around_the_prune(root: Path, callback: PruningCallback, *others: L.Callback, **settings: Any) -> list[Any]:
    around = Around(*others)
    # The module is noted twice: by the same callback in both places.
    battery.train(root, around, callback, around, *others, max_epochs=2, **settings)
    assert len(around.noted) == 2
    return around.noted


def pruned_by_the_function(model: nn.Module, like: nn.Module, method: str, batches: list[Tensor]) -> nn.Module:
    lp.prune(model, plan_in_force(like), compensate=method, batches=batches)
    return model


@pytest.mark.parametrize("method", ["statistics", "fold", "refit"])
def test_a_prune_in_training_is_that_of_the_function(method: str, tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE, compensate=method)
    before, after = around_the_prune(tmp_path, callback)
    expected = pruned_by_the_function(before["module"], after["module"], method, before["batches"])
    assert battery.differences(after["module"], expected) == []
    assert torch.equal(before["random"], after["random"])


def test_momentum_of_changed_weights_is_zero_and_the_rest_is_kept(tmp_path: Path) -> None:
    before, after = around_the_prune(tmp_path, PruningCallback(**ONE_PRUNE, compensate="refit"))
    index = plan_in_force(after["module"]).index()
    # The normalisation behind the first layer takes its mean, whatever the bias.
    changed = {"first.weight", "second.weight", "second.bias", "head.weight", "head.bias"}
    for name, state in after["state"].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(state["step"], before["state"][name]["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            expected = before["state"][name][key]
            for axis, kept in index.get(name, {}).items():
                expected = expected.index_select(axis, kept)
            if key == "exp_avg" and name in changed:
                expected = torch.zeros_like(expected)
            assert torch.equal(state[key], expected), (name, key)


def test_averages_are_compensated_on_their_own_weights(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.9)
    callback = PruningCallback(**ONE_PRUNE, compensate="refit")
    before, after = around_the_prune(tmp_path, callback, average)
    expected = pruned_by_the_function(before["average"], after["average"], "refit", before["batches"])
    assert battery.differences(after["average"], expected) == []
    assert battery.differences(after["average"], after["module"]) != []


def test_a_prune_that_fails_leaves_weights_and_momentum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def fail(trainer: L.Trainer) -> None:
        found["module"] = trainer.lightning_module
        found["optimizer"] = trainer.optimizers[0]
        raise MemoryError

    around = Around()
    monkeypatch.setattr(surgery_step, "rewrap", fail)
    with pytest.raises(MemoryError):
        battery.train(tmp_path, around, PruningCallback(**ONE_PRUNE, compensate="refit"), max_epochs=2)
    (before,) = around.noted
    assert battery.differences(found["module"], before["module"]) == []
    for name, parameter in found["module"].named_parameters():
        for key, value in found["optimizer"].state[parameter].items():
            assert torch.equal(value, before["state"][name][key])


@pytest.mark.parametrize(
    "name",
    [
        "taylor",
        "afie",
        pytest.param("sensitiveness", marks=pytest.mark.long),
        pytest.param("rl_joint", marks=pytest.mark.long),
        pytest.param("learn_to_prune", marks=pytest.mark.long),
    ],
)
def test_every_callback_compensates(name: str, tmp_path: Path) -> None:
    callback = battery.make_callback(name, compensate="fold", compensate_batches=2)
    battery.train(tmp_path, callback)
    prunes = callback.history.prunes
    assert prunes
    assert {prune.compensation.method for prune in prunes} == {"fold"}


def test_the_history_tells_of_it(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE, compensate="refit")
    logger = CSVLogger(tmp_path, version=0)
    battery.train(tmp_path, callback, max_epochs=2, logger=logger)
    (history,) = read_histories(logger.log_dir)
    told = history.prunes[0].compensation
    assert told == callback.history.prunes[0].compensation
    assert (told.method, told.samples, told.not_compensated) == ("refit", 32, {})
    errors = [after for _, after in told.errors.values()]
    assert told.errors.keys() == {"first.weight", "second.weight", "head.weight"}
    assert told.worst_error == max(errors)
    assert told.mean_error == pytest.approx(sum(errors) / 3)
    assert all(after < before for before, after in told.errors.values())


def test_histories_from_before_compensation_are_read(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE, compensate="none")
    battery.train(tmp_path, callback, max_epochs=2)
    content = callback.history.to_json()
    content["version"] = 2
    assert [prune.pop("compensation") for prune in content["prunes"]] == [None]
    assert History.from_json(content).prunes == callback.history.prunes


class Wanting(battery.ResidualClassifier):
    """Has a ``forward`` that wants more than the inputs."""

    def forward(self, images: Tensor, flag: bool) -> Tensor:
        return super().forward(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], True), batch[1])

    validation_step = None


class Willing(PruningCallback):
    """Knows how to run it."""

    def run_on_batch(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], True)


def test_a_tensor_is_no_list_of_entries() -> None:
    images = [torch.ones(3), torch.zeros(3)]
    assert prune_batches._run_first_entry(nn.Identity(), [images, []]) is images
    with pytest.raises(TypeError, match="a batch of type Tensor has no entries"):
        prune_batches._run_first_entry(nn.Identity(), torch.zeros(2, 3))


class Roundabout(Wanting):
    """Takes steps in training alone, and not by its ``forward``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        assert self.training
        return nn.functional.cross_entropy(battery.ResidualClassifier.forward(self, batch[0]), batch[1])


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compensate must be one of auto, none, statistics, fold, refit; got 'refti'"):
        PruningCallback(compensate="refti")
    with pytest.raises(ValueError, match="compensate_batches must be a whole number of at least 1; got 0"):
        PruningCallback(compensate_batches=0)
    settings = {**ONE_PRUNE, "compensate": "refit", "example_inputs": {"images": torch.zeros(1, 1, 8, 8), "flag": True}}
    with pytest.raises(ValueError, match=r"runs Roundabout on training batches, which fails with TypeError: .*flag"):
        battery.train(tmp_path, PruningCallback(**settings), module=Roundabout(), max_epochs=2, limit_val_batches=0)
    module, _ = battery.train(tmp_path, Willing(**settings), module=Roundabout(), max_epochs=2, limit_val_batches=0)
    assert plan_in_force(module) is not None


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"precision": "bf16-true"}, {"fast_dev_run": 2}],
    ids=str,
)
def test_works_with_other_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE, compensate="refit")
    module, _ = battery.train(tmp_path, callback, max_epochs=2, **settings)
    assert callback.steps_done == 1
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


class Wrapping(L.LightningModule):
    """Has a part that is pruned, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.behind = nn.Linear(8 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.behind(self.part(images).flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stream(IterableDataset[Any]):
    """Has no samples that can be asked for."""

    def __iter__(self) -> Any:
        return iter(battery.images(96))


def quiet_trainer(root: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        callbacks=list(callbacks), max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=root, num_sanity_val_steps=0,
    )  # fmt: skip


def test_what_is_behind_a_pruned_submodule_makes_up_too(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE, compensate="refit", module="part", example_inputs=[1, 1, 8, 8])
    quiet_trainer(tmp_path, callback).fit(Wrapping(), DataLoader(battery.images(96), 16))
    errors = callback.history.prunes[0].compensation.errors
    assert errors.keys() == {"part.2.weight", "behind.weight"}


def test_validation_batches_stand_in_for_a_stream(tmp_path: Path) -> None:
    stream = DataLoader(Stream(), 16)
    callback = PruningCallback(**ONE_PRUNE, compensate="fold")
    quiet_trainer(tmp_path, callback).fit(battery.ResidualClassifier(), stream, DataLoader(battery.images(64), 32))
    assert callback.history.prunes[0].compensation.samples == 64
    callback = PruningCallback(**ONE_PRUNE, compensate="fold")
    with pytest.raises(ValueError, match=r"no data set .* can be asked for samples, measures on the validation split"):
        quiet_trainer(tmp_path, callback).fit(battery.ResidualClassifier(), stream)


class Echo(nn.Module):
    def forward(self, x: Tensor, y: Any = None) -> list[Any]:
        return [x, y]


ONE, TWO, LABELS = torch.ones(2), torch.zeros(2), torch.arange(2)


@pytest.mark.parametrize(
    ("batch", "arguments", "given"),
    [
        (ONE, 1, [ONE, None]),
        ((ONE, LABELS), 1, [ONE, None]),
        ([ONE, TWO, LABELS], 2, [ONE, TWO]),
        (((ONE, TWO), LABELS), 1, [ONE, None]),
        ({"x": ONE, "labels": LABELS}, 1, [ONE, None]),
        ({"x": ONE, "y": TWO, "labels": LABELS}, 1, [ONE, TWO]),
        (({"x": ONE}, LABELS), 1, [ONE, None]),
        ({"images": ONE}, 1, [{"images": ONE}, None]),
    ],
    ids=str,
)
def test_forward_is_given_the_inputs_of_a_batch(batch: Any, arguments: int, given: list[Any]) -> None:
    found = run_forward(Echo(), batch, arguments)
    assert all(one is other or one == other for one, other in zip(found, given, strict=True))


def test_batches_are_those_of_the_training_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sampler does, and without a start of the loader, which knows its position."""
    started: list[int] = []
    seen: list[int] = []
    work_out = compensation_step.compensation

    class Counting(battery.ResumableLoader):
        def __iter__(self) -> Any:
            started.append(1)
            return super().__iter__()

    def watched(model: nn.Module, plan: Any, method: str, batches: list[Any], run: Any) -> Any:
        before = len(started)
        seen.extend(len(batch[0]) for batch in batches)
        found = work_out(model, plan, method, batches, run)
        assert len(started) == before
        return found

    monkeypatch.setattr(compensation_step, "compensation", watched)
    trainer = quiet_trainer(tmp_path, PruningCallback(**ONE_PRUNE, compensate="fold"))
    trainer.fit(battery.ResidualClassifier(), Counting(battery.images(96), 16), DataLoader(battery.images(64), 32))
    assert seen == [16, 16]
    assert len(started) == 2  # once an epoch


# -- the default -------------------------------------------------------------------------------------------------------


def test_without_a_criterion_batches_rank_and_refit(tmp_path: Path) -> None:
    callback = PruningCallback(round_to=2, compensate_batches=2)
    before, after = around_the_prune(tmp_path, callback)
    graph = lp.trace(before["module"], before["batches"][0][:1])
    plan = lp.plan(graph, lp.criteria.coherent_obs(graph, before["batches"]), 0.5, round_to=2)
    assert plan_in_force(after["module"]).digest == plan.digest
    expected = pruned_by_the_function(before["module"], after["module"], "refit", before["batches"])
    assert battery.differences(after["module"], expected) == []
    assert torch.equal(before["random"], after["random"])


def test_several_prunes_rank_on_other_batches_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    score = lp.criteria.score

    def watched(graph: Any, criterion: Any, batches: list[Any], run: Any) -> Any:
        seen.append(torch.cat([batch[0] for batch in batches]))
        return score(graph, criterion, batches, run)

    monkeypatch.setattr(lp.criteria, "score", watched)
    battery.train(tmp_path, battery.make_callback("default"))
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])


def test_any_criterion_that_needs_no_labels_is_given_batches(tmp_path: Path) -> None:
    callback = PruningCallback(round_to=2, criterion="apoz", compensate="none", compensate_batches=2)
    before, after = around_the_prune(tmp_path, callback)
    graph = lp.trace(before["module"], before["batches"][0][:1])
    plan = lp.plan(graph, lp.criteria.apoz(graph, before["batches"]), 0.5, round_to=2)
    assert plan_in_force(after["module"]).digest == plan.digest


def test_where_forward_does_not_take_batches_the_default_warns_and_does_without(tmp_path: Path) -> None:
    example = {"images": torch.zeros(1, 1, 8, 8), "flag": True}
    settings: dict[str, Any] = {"round_to": 2, "example_inputs": example}
    train: dict[str, Any] = {"module": Roundabout(), "max_epochs": 2, "limit_val_batches": 0}
    callback = PruningCallback(**settings)
    told = r"ranks channels without batches and does not compensate for the prune: .* fails with TypeError: .*flag"
    with pytest.warns(UserWarning, match=told):
        module, _ = battery.train(tmp_path / "default", callback, **train)
    assert plan_in_force(module) is not None
    assert callback.history.prunes[0].compensation is None
    with pytest.raises(ValueError, match="criterion='apoz' runs Roundabout on training batches, which fails with"):
        battery.train(
            tmp_path / "apoz", PruningCallback(**settings, criterion="apoz"), **{**train, "module": Roundabout()}
        )


def test_a_submodule_that_training_alone_runs_is_ranked_by_what_it_is_given_there(tmp_path: Path) -> None:
    class Aside(Wrapping):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.aside(self(batch[0])).square().mean()

    callback = PruningCallback(module="aside", example_inputs=[1, 4], round_to=2)
    module = Aside()
    quiet_trainer(tmp_path, callback).fit(module, DataLoader(battery.images(96), 16))
    assert callback.history.prunes[0].compensation.method == "refit"
    assert plan_in_force(module).widths == {"aside.0": 8}
