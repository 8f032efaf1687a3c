"""Where the network is traced without example inputs of its own, one sample of the training data stands in."""

import random
from typing import Any

import battery
import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_prune.callbacks import PruningCallback
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
    assert callback.batch_like == {"shape": [1, 1, 8, 8], "dtype": "float32"}
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
