"""The plan goes wherever the weights go, with the pruning callback in the Trainer or without it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, TaylorRankCallback
from lightning_prune.graph.channel_graph import plan_in_force


@pytest.mark.parametrize("weights_only", [False, True])
def test_saved_by_hand_after_fit(weights_only: bool, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    assert battery.differences(module, lp.load_pruned(battery.ResidualClassifier, tmp_path / "end.ckpt")) == []


def test_a_pruned_module_is_trained_on_and_resumed_without_the_callback(tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), max_epochs=4)
    path = trainer.checkpoint_callback.best_model_path
    with_it, _ = battery.train(tmp_path / "with", battery.make_callback("magnitude"), ckpt_path=path)
    without, trainer = battery.train(tmp_path / "without", ckpt_path=path)
    assert battery.differences(with_it, without) == []
    again = lp.load_pruned(battery.ResidualClassifier, trainer.checkpoint_callback.best_model_path)
    assert battery.differences(without, again) == []


def test_modules_that_were_never_pruned_are_not_touched(tmp_path: Path) -> None:
    plain, trainer = battery.train(tmp_path, max_epochs=2)
    assert plan_in_force(plain) is None
    resumed, _ = battery.train(tmp_path / "on", ckpt_path=trainer.checkpoint_callback.best_model_path, max_epochs=2)
    assert battery.differences(plain, resumed) == []
    loaded = battery.ResidualClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert battery.differences(plain, loaded) == []
    assert plan_in_force(loaded) is None


# -- load_from_checkpoint of classes that know nothing of pruning ------------------------------------------------------


class Careful(battery.ResidualClassifier):
    """Looks into the checkpoint as people write it: keeps a note, and leaves out what has another shape."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = "mine"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note, own, saved = checkpoint["note"], self.state_dict(), checkpoint["state_dict"]
        self.left_out = [name for name in own if own[name].shape != saved[name].shape]
        for name in self.left_out:
            saved[name] = own[name]


class Tied(battery.ResidualClassifier):
    """Two layers of the same weights, of which both names are in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(24, 12, 3, padding=1)
        self.again.weight = self.second.weight

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.adaptive_avg_pool2d(self.second(x) + self.again(x), 2).flatten(1))


STRANGERS: dict[str, tuple[type[L.LightningModule], dict[str, Any]]] = {
    "as it is": (battery.ResidualClassifier, {}),
    "weights alone": (battery.ResidualClassifier, {"weights_only": True, "map_location": "cpu"}),
    "not strict": (battery.ResidualClassifier, {"strict": False}),
    "on_load_checkpoint of its own": (Careful, {}),
    "tied weights": (Tied, {}),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_load_from_checkpoint(stranger: str, tmp_path: Path) -> None:
    kind, settings = STRANGERS[stranger]
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), module=kind())
    path = trainer.checkpoint_callback.best_model_path
    loaded = kind.load_from_checkpoint(path, **settings)
    assert plan_in_force(loaded) == plan_in_force(module) is not None
    assert battery.differences(module, loaded) == []
    assert type(loaded) is kind
    assert loaded.hparams == module.hparams
    images = battery.images(8).tensors[0]
    torch.testing.assert_close(loaded.eval()(images), module.eval()(images), rtol=0, atol=0)
    assert getattr(loaded, "note", "mine") == "mine"
    assert getattr(loaded, "left_out", []) == []


def test_load_from_checkpoint_of_data_beside_a_pruned_module(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def __init__(self, size: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return battery.loaders()[0]

    callbacks = [battery.make_callback("magnitude"), ModelCheckpoint(tmp_path, filename="end")]
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(battery.ResidualClassifier(), datamodule=Data(size=3))
    assert Data.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True).hparams["size"] == 3


def test_load_from_checkpoint_into_another_width_fails_as_it_does_without_us(tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    with pytest.raises(RuntimeError, match=r"size mismatch for stem.weight: .*\[12, 1, 3, 3\].*\[10, 1, 3, 3\]"):
        battery.ResidualClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, width=10)


def test_importing_the_package_alone_does_not_import_lightning() -> None:
    line = "import lightning_prune, sys; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0


# -- what a run can be like --------------------------------------------------------------------------------------------


class TwoViews(battery.ResidualClassifier):
    """Two forward passes of different batch sizes in a step, as semi-supervised and multi-crop training has it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        few, many = self(batch[0][:4]), self(batch[0][4:])
        return F.cross_entropy(few, batch[1][:4]) + many.softmax(1).pow(2).sum(1).mean()


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
def test_two_forward_passes_of_different_sizes_in_a_step(name: str, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback(name), module=TwoViews())
    assert plan_in_force(module) is not None
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5


def test_taylor_listens_for_an_epoch_where_a_resumed_run_has_not(tmp_path: Path) -> None:
    """The checkpoint comes from a run without pruning: the prune that is due waits until channels have been ranked."""
    _, trainer = battery.train(tmp_path, max_epochs=3)
    path = trainer.checkpoint_callback.best_model_path
    callback = TaylorRankCallback(keep=0.5, start_epoch=1, round_to=2)
    module, trainer = battery.train(tmp_path / "on", callback, ckpt_path=path)
    assert callback.steps_done == 1
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    assert module.first.out_channels < 24


def test_a_run_that_ends_before_its_last_prune_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ended with 1\.000 of the flops where keep=0\.5 was asked for, after 0 of 1"):
        battery.train(tmp_path, PruningCallback(round_to=2), max_epochs=-1, max_steps=3)
