"""Where the network is traced without example inputs of its own, one sample of the training data stands in."""

import random
from typing import Any

import battery
import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_prune.callbacks import PruningCallback
from lightning_prune.callbacks.batches import training_batches
from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.models import ImageClassifier


class Position(L.Callback):
    """Note how far the loader is when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.used = trainer.train_dataloader.used


def test_a_loader_that_knows_its_position_keeps_it() -> None:
    pytest.importorskip("sklearn")
    module, position = ImageClassifier("digits", 10, (1, 8, 8)), Position()
    module.example_input_array = None
    callback = PruningCallback(keep=0.5)
    trainer = L.Trainer(
        max_epochs=2, limit_train_batches=2, limit_val_batches=1, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, position],
    )  # fmt: skip
    trainer.fit(module, DigitsDataModule())
    assert (callback.state.batch_like["shape"], callback.state.batch_like["dtype"]) == ([1, 1, 8, 8], "float32")
    assert position.used == 0
    assert callback.history.after.flops <= 0.5 * callback.history.before.flops
    assert torch.isfinite(module.network.linear.weight).all()


class Augmented(Dataset[Any]):
    """Draws from all generators of random numbers there are."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(1, 8, 8) + random.random() + np.random.rand(), index % 4


class States(L.Callback):
    """Note the state of these generators when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def test_the_sample_leaves_random_numbers_as_they_were() -> None:
    before, after = States(), States()
    module = battery.ResidualClassifier()
    module.example_input_array = None
    trainer = L.Trainer(
        max_epochs=2, limit_train_batches=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[before, PruningCallback(keep=0.5), after],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Augmented(), 16))
    assert before.found == after.found


class TwoLoaders(battery.ResidualClassifier):
    """Trains on the batches of one of two loaders, which a hook finds by its name and brightens."""

    after: Any = staticmethod(lambda batch: batch)  # what the hook makes of the batch

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.trainer.training:
            return batch
        assert len(batch["other"]) == 2
        images, labels = batch["images"]
        return self.after({**batch, "images": [images + 1, labels]})

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch["images"], batch_idx)


def fit_on_two_loaders(module: L.LightningModule, *callbacks: L.Callback) -> None:
    training, validation = battery.loaders()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    few = DataLoader(TensorDataset(torch.zeros(3, 5), torch.zeros(3)), 2)
    trainer.fit(module, {"images": training, "other": few}, validation)


@pytest.mark.filterwarnings("ignore:Prune . of .")
@pytest.mark.parametrize("name", ["magnitude", "rl_joint", "learn_to_prune"])
def test_hooks_get_the_batches_of_several_loaders_together(name: str) -> None:
    callback = battery.make_callback(name)
    fit_on_two_loaders(TwoLoaders(), callback)
    assert (callback.state.batch_like["shape"], callback.state.batch_like["dtype"]) == ([1, 1, 8, 8], "float32")
    assert callback.history.after.flops <= 0.5 * callback.history.before.flops


class Draw(L.Callback):
    """Draw training batches when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.drawn = training_batches(trainer, 2, seed=0)


def test_training_batches_are_those_of_the_first_loader_as_hooks_leave_them() -> None:
    drawn, plain = Draw(), Draw()
    fit_on_two_loaders(TwoLoaders(), drawn)
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[plain],
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(battery.ResidualClassifier(), *battery.loaders())  # fmt: skip
    for (images, labels), (expected, same) in zip(drawn.drawn, plain.drawn, strict=True):
        assert torch.equal(images, expected + 1)
        assert torch.equal(labels, same)


def test_a_step_that_fails_on_a_copy_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """By a warning, but where a loader makes batches in a way of its own: training may get other ones."""
    module = TwoLoaders()
    module.after = lambda batch: {"x": batch["images"][0]}
    with caplog.at_level("INFO"), pytest.raises(KeyError):  # as it does in training
        fit_on_two_loaders(module, PruningCallback(criterion="l1", compensate="none"))
    assert "training_step of TwoLoaders could not be traced (KeyError: 'images')" in caplog.text
