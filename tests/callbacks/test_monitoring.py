"""Sub-networks are measured by what the module's own validation logs; labels that mean nothing are refused."""

from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import lightning_prune as lp
from lightning_prune.callbacks import LearnToPruneCallback, RLJointPruneCallback, SensitivenessCallback
from lightning_prune.callbacks.monitoring import logged_by
from lightning_prune.candidates import evaluate_candidates

MEASURING = {
    "sensitiveness": lambda **settings: SensitivenessCallback(keep=0.5, levels=[0.5], draws=1, **settings),
    "rl_joint": lambda **settings: RLJointPruneCallback(
        keep=0.5, start_epoch=1, warmup_epochs=0, episodes=2, candidate_batches=1, **settings
    ),
    "learn_to_prune": lambda **settings: LearnToPruneCallback(keep=0.5, updates=1, samples=2, **settings),
}


class Regression(battery.ResidualClassifier):
    """Learns to tell the mean of an image; what its loaders have for labels is nothing to it."""

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[0].mean((1, 2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val/mse": self.loss(batch), "val/text": 1.0})


@pytest.mark.filterwarnings("ignore:Prune . of .")
@pytest.mark.parametrize("name", MEASURING)
def test_a_regression_is_measured_by_what_it_logs(name: str, tmp_path: Path) -> None:
    callback = MEASURING[name](monitor="val/mse", mode="min", round_to=1)
    battery.train(tmp_path, callback, module=Regression(), max_epochs=2)
    assert callback.history.after.cost_model_flops <= 0.5 * callback.history.before.cost_model_flops


@pytest.mark.parametrize("name", MEASURING)
def test_labels_that_nothing_is_learned_from_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"Regression does not learn from the labels .* logs with monitor, or give eval"
    ):
        battery.train(tmp_path, MEASURING[name](), module=Regression(), max_epochs=2)


class Counted(battery.ResidualClassifier):
    """Logs by a metric that adds up, at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val/metric", self.metric.compute())


class Measure(Callback):
    """Measure candidates in two ways when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from lightning_prune.callbacks.monitoring import _Monitored

        graph = lp.trace(pl_module, torch.zeros(1, 1, 8, 8))
        kept = [{}, {"first": torch.arange(5)}, {"stem": torch.arange(3), "first": torch.arange(20)}]
        batches = [tuple(battery.images(32).tensors), tuple(tensor[:20] for tensor in battery.images(24).tensors)]
        monitored = _Monitored(trainer, "val/metric", "max")
        self.found = [
            evaluate_candidates(graph, kept, batches, **settings).accuracy for settings in ({}, {"evaluate": monitored})
        ]
        self.logged = logged_by(trainer, Counted(), batches[0])
        self.metric = pl_module.metric.update_count


def test_the_metric_of_an_epoch_is_that_of_each_batch(tmp_path: Path) -> None:
    measure = Measure()
    battery.train(tmp_path, measure, module=Counted(), max_epochs=1)
    torch.testing.assert_close(measure.found[0].float(), measure.found[1].float())
    assert measure.logged.keys() == {"val/metric"}
    assert measure.metric == 0  # that of the module itself is as it was


def test_wrong_monitors_are_refused(tmp_path: Path) -> None:
    said = "monitor='val/x' is not among what the validation of ResidualClassifier logs: 'val/accuracy'"
    with pytest.raises(ValueError, match=said):
        battery.train(tmp_path, SensitivenessCallback(monitor="val/x"), max_epochs=2)
    with pytest.raises(ValueError, match="evaluate and monitor='a' both say what is measured; give one of them"):
        SensitivenessCallback(monitor="a", evaluate=lambda model, batch: (0, 0))
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', as for ModelCheckpoint; got 'most'"):
        RLJointPruneCallback(monitor="a", mode="most")
    with pytest.raises(ValueError, match="finetune_steps needs a loss to train copies on"):
        LearnToPruneCallback(monitor="a", finetune_steps=2)


def test_labels_beyond_the_logits_are_refused() -> None:
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"The labels go up to 3, and the model returns 3 logits; .*pass `evaluate`"):
        lp.candidates.classification(torch.nn.Identity(), (logits, labels))
