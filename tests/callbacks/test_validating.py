"""The module's own validation around each prune: right numbers, and no trace of it in training."""

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, validating
from lightning_prune.callbacks.batches import training_batches
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.history import History, MetricsAround, read_histories
from lightning_prune.reporting.report import render

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # prunes nothing, in steps of two channels
ONE_PRUNE: dict[str, Any] = {"keep": 0.5, "start_epoch": 1, "round_to": 2, "criterion": "l1", "compensate": "none"}


class Before(L.Callback):
    """Keeps the module as it is right before the prune, and as it is right after."""

    def __init__(self, average: EMAWeightAveraging | None = None) -> None:
        self.average = average
        self.modules: list[nn.Module] = []
        self.batches: list[Any] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            model = self.average._average_model.module if self.average is not None else pl_module
            self.modules.append(copy.deepcopy(model))
            self.batches = [batch[0] for batch in training_batches(trainer, 2, seed=1)]


def accuracy(model: nn.Module, count: int = 64) -> float:
    images, labels = battery.images(64).tensors
    with torch.no_grad():
        return float((model.eval()(images[:count]).argmax(1) == labels[:count]).double().mean())


@pytest.mark.parametrize("averaged", [False, True], ids=["module", "average"])
def test_metrics_are_those_of_the_networks_before_and_after(averaged: bool, tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5) if averaged else None
    around, others = Before(average), [average] if average is not None else []
    callback = PruningCallback(**{**ONE_PRUNE, "compensate": "refit"}, compensate_batches=2)
    battery.train(tmp_path, around, callback, around, *others, max_epochs=3)
    before, after = around.modules
    plain = copy.deepcopy(before)
    lp.prune(plain, plan_in_force(after))
    (prune,) = callback.history.prunes
    assert prune.metrics.before == {"val/accuracy": accuracy(before)}
    assert prune.metrics.uncompensated == {"val/accuracy": accuracy(plain)}
    assert prune.metrics.after == {"val/accuracy": accuracy(after)}
    assert prune.metrics.before["val/accuracy"] == pytest.approx(callback.history.epochs[0]["val/accuracy"])
    assert callback.history.metrics_at_end == pytest.approx(callback.history.after.metrics)


class Logging(battery.ResidualClassifier):
    """Logs in all the ways there are, draws random numbers, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.seen: list[Any] = []
        self.steps = 0

    def on_validation_epoch_start(self) -> None:
        self.hits: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.rand(3)
        self.steps += 1
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("val/loss", loss, sync_dist=True)
        self.log("val/own", self.accuracy, on_step=True, on_epoch=True)
        self.log("val/first", float(batch[1][0]), batch_size=1)
        self.log("val/sum", 1.0, reduce_fx="sum")
        self.log_dict({"other": 1.0, "val/worst": loss}, on_step=True, on_epoch=False)
        if self.logger is not None:
            self.logger.log_metrics({"direct": 1.0}, step=1)
        return (logits.argmax(1) == batch[1]).float()

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.hits.append(outputs)

    def on_validation_epoch_end(self) -> None:
        self.log("val/joined", torch.cat(self.hits).mean())


def test_all_kinds_of_logging_are_understood_and_nothing_is_left_behind(tmp_path: Path) -> None:
    ends, texts = [], []
    for count in (0, 16):
        L.seed_everything(0, verbose=False)
        module, logger = Logging(), CSVLogger(tmp_path / str(count), version=0)
        callback = PruningCallback(**ONE_PRUNE, validate_batches=count)
        battery.train(tmp_path / str(count), callback, module=module, max_epochs=3, logger=logger)
        ends.append((module.state_dict(), module.steps, torch.get_rng_state()))
        texts.append(Path(logger.log_dir, "metrics.csv").read_text())
    (weights, steps, random), (again, steps_again, random_again) = ends
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (steps, torch.equal(random, random_again)) == (steps_again, True)
    assert texts[0].count("\n1.0") == texts[1].count("\n1.0")  # of what is logged directly
    head = set(texts[1].splitlines()[0].split(",")) - set(texts[0].splitlines()[0].split(","))
    names = {"val/joined", "val/loss", "val/own", "val/first"}
    assert head == {f"prune/{when}/{name}" for when in ("before", "after") for name in names}
    (prune,) = callback.history.prunes
    epoch = callback.history.epochs[0]
    assert prune.metrics.before == pytest.approx({name: epoch[name] for name in names}, abs=1e-6)
    assert callback.history.metrics_at_end == pytest.approx(
        {name: callback.history.after.metrics[name] for name in names}
    )
    assert prune.metrics.before["val/own"] == pytest.approx(prune.metrics.before["val/joined"])


def test_fewer_batches_are_the_same_samples_each_time(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Noting(battery.ResidualClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if type(self.trainer).__name__ != "Trainer" and not batch[0].is_meta and len(batch[0]) == 32:
                seen.append(batch[0])
            super().validation_step(batch, batch_idx)

    callback = PruningCallback(**{**ONE_PRUNE, "steps": 2}, validate_batches=1)
    battery.train(tmp_path, callback, module=Noting(), max_epochs=3)
    assert len(seen) == 5  # before and after two prunes, and at the end
    assert all(torch.equal(seen[0], images) for images in seen)
    assert len(seen[0]) == 32


def test_they_survive_a_resume(tmp_path: Path) -> None:
    settings = {**ONE_PRUNE, "steps": 2, "compensate": "fold", "compensate_batches": 2}
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    unbroken = PruningCallback(**settings)
    battery.train(tmp_path / "unbroken", unbroken, saver, max_epochs=4)
    for step in (5, 15):  # before the first prune, and between the two and the end
        resumed = PruningCallback(**settings)
        path = tmp_path / f"step={step}.ckpt"
        battery.train(tmp_path / str(step), resumed, ckpt_path=path, max_epochs=4)
        assert [prune.metrics for prune in resumed.history.prunes] == [
            prune.metrics for prune in unbroken.history.prunes
        ]
        assert resumed.history.metrics_at_end == unbroken.history.metrics_at_end


class Failing(battery.ResidualClassifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if type(self.trainer).__name__ != "Trainer":
            raise KeyError("nothing of the kind")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(battery.images(64))


def test_where_it_cannot_be_done_training_goes_on(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE)
    with pytest.warns(UserWarning, match="the validation of Failing fails on a copy of it, with KeyError: .*kind"):
        battery.train(tmp_path, callback, module=Failing(), max_epochs=2)
    assert callback.history.prunes[0].metrics == MetricsAround()
    for loaders in ((DataLoader(Stream(), 16),), ()):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", module="lightning.pytorch|torch")
            warnings.filterwarnings("ignore", ".* of the flops is kept where")
            callback = PruningCallback(**ONE_PRUNE, example_inputs=[1, 1, 8, 8])
            trainer = L.Trainer(
                max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False, callbacks=[callback], num_sanity_val_steps=0,
            )  # fmt: skip
            trainer.fit(battery.ResidualClassifier(), battery.loaders()[0], *loaders)
        assert callback.history.prunes[0].metrics == MetricsAround()


def test_they_are_told_in_file_and_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callback = PruningCallback(**{**ONE_PRUNE, "compensate": "fold"}, compensate_batches=2)
    battery.train(tmp_path, callback, max_epochs=3, logger=logger)
    (history,) = read_histories(logger.log_dir)
    (prune,) = history.prunes
    assert prune.metrics == callback.history.prunes[0].metrics
    content = json.loads(Path(logger.log_dir, "pruning.json").read_text())
    assert content["version"] == 5
    numbers = [getattr(prune.metrics, when)["val/accuracy"] for when in ("before", "uncompensated", "after")]
    assert [content["prunes"][0]["metrics"][when]["val/accuracy"] for when in ("before", "uncompensated", "after")] == (
        numbers
    )
    page = " ".join(render([history], "run").split())
    before, without, after = (f"{number:.4f}" for number in numbers)
    at_end = f"{history.metrics_at_end['val/accuracy']:.4f}"
    for when, *told in (("1", before, without, after), ("end", "", "", at_end)):
        assert " ".join(f"<td>{cell}</td>" for cell in ("val/accuracy", when, *told)) in page
    assert f"val/accuracy: {before} before, {without} pruned, {after} compensated" in caplog.text


def test_histories_without_them_are_read(tmp_path: Path) -> None:
    callback = PruningCallback(**ONE_PRUNE)
    battery.train(tmp_path, callback, max_epochs=2)
    content = callback.history.to_json()
    content["version"] = 3
    del content["metrics_at_end"], content["prunes"][0]["metrics"]
    read = History.from_json(content)
    assert read.prunes[0].metrics == MetricsAround()
    assert "What each prune cost" not in render([read], "run")


def test_a_wrong_number_is_refused() -> None:
    with pytest.raises(ValueError, match="validate_batches must be a whole number of at least 0; got -1"):
        PruningCallback(validate_batches=-1)


def test_ranks_count_by_their_samples_and_one_that_fails_ends_it_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[Any] = [{"val/a": (3.0, 4.0), "val/b": (1.0, 1.0)}, {"val/a": (0.0, 2.0)}]
    trainer = SimpleNamespace(enable_validation=True, fast_dev_run=False, lightning_module=nn.Linear(1, 1))
    validator = validating.Validator(trainer, 4)
    monkeypatch.setattr(validating.Validator, "_tried", lambda *_: ranks[0])
    monkeypatch.setattr(validating, "_of_all_ranks", lambda own: [own, *ranks[1:]])
    assert validator.now() == {"val/a": 0.5, "val/b": 1.0}
    ranks.append("KeyError: 'x'")
    with pytest.warns(UserWarning, match=r"the validation of Linear fails on a copy of it, with KeyError: 'x' Set"):
        assert validator.now() == {}
    assert validator.now() == {}  # and says it once
