"""Modules of libraries that import ``pytorch_lightning``, with its own Trainer: the same bits as with ``lightning``."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import battery
import lightning
import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.pruning_plan import plan_in_force

installed = pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="needs pytorch-lightning")
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def module_of(package: Any) -> Any:
    """Return a class of one of the packages."""

    class Both(package.LightningModule):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
            )

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            scores = self(batch[0])
            self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]))
            self.log("val/accuracy", (scores.argmax(1) == batch[1]).float().mean())

        test_step = validation_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Both


def run(package: Any, root: Path, name: str, path: Any = None, **settings: Any) -> tuple[Any, Any, PruningCallback]:
    callbacks = package.callbacks
    callback = battery.make_callback(name)
    others = [
        callbacks.ModelCheckpoint(root / "best", monitor="val_loss"),
        callbacks.ModelCheckpoint(root / "all", filename="{epoch}", save_top_k=-1),
        callbacks.EarlyStopping("val_loss", patience=50),
        callbacks.EMAWeightAveraging(decay=0.9),
    ]
    usual: dict[str, Any] = {
        "max_epochs": battery.EPOCHS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = package.Trainer(callbacks=[callback, *others], **{**usual, **settings})
    torch.manual_seed(0)
    module = module_of(package)()
    trainer.fit(module, *battery.loaders(), ckpt_path=path)
    return module, trainer, callback


@installed
@pytest.mark.filterwarnings(
    "ignore:Prune . of .", "ignore:Found keys that are not in", "ignore:You're using the Weight"
)
@pytest.mark.parametrize(
    "name", ["taylor", *(pytest.param(name, marks=pytest.mark.long) for name in battery.CALLBACKS if name != "taylor")]
)
def test_its_trainer_prunes_as_that_of_lightning(name: str, tmp_path: Path) -> None:
    found = {package: run(import_module(package), tmp_path / package, name) for package in PACKAGES}
    (expected, _, _), (module, trainer, callback) = (found[package] for package in PACKAGES)
    assert type(trainer).__module__.startswith("pytorch_lightning")
    assert battery.differences(expected, module) == []
    assert callback.is_complete
    assert battery.differences(module, lp.load_pruned(type(module), callback.result_path)) == []
    best = trainer.checkpoint_callback.best_model_path
    for loaded in (type(module).load_from_checkpoint(best), lp.load_pruned(type(module), best)):
        assert plan_in_force(loaded) == plan_in_force(module)
    trainer.test(module, battery.loaders()[1], ckpt_path="best", verbose=False)
    assert plan_in_force(module) == plan_in_force(expected)
    middle = tmp_path / "pytorch_lightning" / "all" / "epoch=1.ckpt"
    resumed, _, _ = run(import_module("pytorch_lightning"), tmp_path / "resumed", name, middle)
    assert battery.differences(expected, resumed) == []


@installed
def test_two_forked_ranks_hand_the_pruned_module_back(tmp_path: Path) -> None:
    package = import_module("pytorch_lightning")
    module, _, _ = run(package, tmp_path, "magnitude", devices=2, strategy="ddp_fork")
    plan = plan_in_force(module)
    assert plan is not None
    assert plan.widths["net.1"] < 16


@installed
def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = import_module("pytorch_lightning")
    monkeypatch.setattr(package, "__version__", "2.4.0")
    message = (
        rf"The Trainer is that of pytorch_lightning 2.4.0, .* pip install pytorch-lightning=={lightning.__version__}"
    )
    with pytest.raises(ValueError, match=message):
        run(package, tmp_path, "magnitude")
