"""The plan goes wherever the weights go, with the pruning callback in the Trainer or without it."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core import saving
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from shortened import ordinary
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, TaylorRankCallback, plan_checkpoint_io
from lightning_prune.pruning_plan import plan_in_force


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
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ended with 1\.000 of the flops where keep=0\.5 was asked for, after 0 of 1"):
        battery.train(tmp_path, PruningCallback(round_to=2), Stop())


# -- modules that are whole only with Lightning's hooks ----------------------------------------------------------------


class Lazy(battery.ResidualClassifier):
    """Has its head from ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def configure_model(self) -> None:
        if self.head is None:
            self.head = nn.Linear(48, 4)


class Configured(battery.ResidualClassifier):
    """Takes all its settings as one argument."""

    def __init__(self, conf: dict[str, int] | None = None) -> None:
        conf = conf or {"width": 12}
        super().__init__(conf["width"])
        self.save_hyperparameters(conf)


class NotStrict(battery.ResidualClassifier):
    """Leaves a layer that never trains out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.teacher = nn.Linear(2, 2).requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "teacher" not in name}


@pytest.mark.parametrize("kind", [Lazy, Configured, NotStrict, Careful, Tied])
def test_load_pruned_takes_what_load_from_checkpoint_takes(kind: type[L.LightningModule], tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), module=kind())
    path = trainer.checkpoint_callback.best_model_path
    expected = kind.load_from_checkpoint(path)
    for loaded in (lp.load_pruned(kind, path), lp.load_pruned(kind(), path), lp.load_pruned(module, path)):
        assert plan_in_force(loaded) == plan_in_force(expected) is not None
        assert battery.differences(expected, loaded) == []
        assert not loaded.training


def test_settings_go_into_the_one_argument_that_was_saved(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), module=Configured({"width": 10}))
    path = trainer.checkpoint_callback.best_model_path
    assert battery.differences(module, lp.load_pruned(Configured, path)) == []
    assert battery.differences(module, lp.load_pruned(Configured, path, conf={"width": 10})) == []
    for settings in ({"width": 8}, {"conf": {"width": 8}}):
        with pytest.raises(ValueError, match=r"another architecture: 'stem.weight' has shape \(10, .* and \(8, "):
            lp.load_pruned(Configured, path, **settings)


def test_tied_weights_that_were_saved_one_by_one(tmp_path: Path) -> None:
    """`AsyncCheckpointIO` copies the tensors: nothing in the file says that two names are one tensor."""
    module, trainer = battery.train(
        tmp_path, battery.make_callback("magnitude"), module=Tied(), plugins=[AsyncCheckpointIO()]
    )
    path = trainer.checkpoint_callback.best_model_path
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights["second.weight"].data_ptr() != weights["again.weight"].data_ptr()
    for loaded in (lp.load_pruned(Tied, path), Tied.load_from_checkpoint(path)):
        assert battery.differences(module, loaded) == []
        assert loaded.again.weight is loaded.second.weight
    more, _ = battery.train(tmp_path / "more", ckpt_path=path, module=Tied(), max_epochs=battery.EPOCHS)
    assert battery.differences(module, more) == []


class Refitted(battery.ResidualClassifier):
    """Takes as many classes as the checkpoint has."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(48, classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weight = checkpoint["state_dict"]["head.weight"]
        if weight.shape != self.head.weight.shape:
            self.head = nn.Linear(weight.shape[1], weight.shape[0])


def test_a_hook_that_rebuilds_a_pruned_layer(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), module=Refitted(), max_epochs=4)
    path = trainer.checkpoint_callback.best_model_path
    for loaded in (lp.load_pruned(Refitted, path, classes=7), Refitted.load_from_checkpoint(path, classes=7)):
        assert battery.differences(module, loaded) == []
    resumed = [
        battery.train(tmp_path / f"{classes}", battery.make_callback("magnitude"), ckpt_path=path, module=made)[0]
        for classes, made in ((4, Refitted(4)), (7, Refitted(7)))
    ]
    assert battery.differences(*resumed) == []
    assert plan_in_force(resumed[0]) == plan_in_force(resumed[1]) is not None
    assert resumed[1].head.in_features < 48


def test_a_hook_that_rebuilds_a_layer_of_a_checkpoint_that_was_never_pruned(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, module=Refitted(), max_epochs=1)
    path = trainer.checkpoint_callback.best_model_path
    assert battery.differences(module, lp.load_pruned(Refitted, path, classes=7)) == []


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_run_from_a_checkpoint_that_was_pruned_less(epoch: int, tmp_path: Path) -> None:
    """The parent process widens the module again without having seen the checkpoint."""
    module, _ = battery.train(tmp_path, battery.make_callback("magnitude"))
    path = next((tmp_path / "checkpoints").glob(f"epoch={epoch}-*"))
    earlier = lp.load_pruned(battery.ResidualClassifier, path)
    assert earlier.stem.out_channels > module.stem.out_channels
    _, trainer = battery.train(tmp_path / "on", ckpt_path=path, module=module, strategy="ddp_fork")
    assert plan_in_force(module) == plan_in_force(earlier)
    last = lp.load_pruned(battery.ResidualClassifier, trainer.checkpoint_callback.best_model_path)
    assert battery.differences(module, last) == []


def test_callbacks_get_what_the_hook_has_made_of_the_checkpoint(tmp_path: Path) -> None:
    class Sevens(battery.ResidualClassifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["state_dict"]["first.weight"].shape == self.first.weight.shape
            checkpoint["state_dict"]["head.bias"] = torch.full((4,), 7.0)
            checkpoint["note"] = "mine"

    class Watch(Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.checkpoint, self.bias = dict(checkpoint), pl_module.head.bias.detach().clone()

    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    path, watch = trainer.checkpoint_callback.best_model_path, Watch()
    module, _ = battery.train(tmp_path / "on", watch, ckpt_path=path, module=Sevens())
    expected = torch.load(path, weights_only=True)["state_dict"] | {"head.bias": torch.full((4,), 7.0)}
    assert watch.checkpoint["note"] == "mine"
    assert watch.checkpoint["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in watch.checkpoint["state_dict"].items())
    assert torch.equal(watch.bias, expected["head.bias"])
    assert module.first.weight.shape == expected["first.weight"].shape


# -- any CheckpointIO --------------------------------------------------------------------------------------------------


class Noting(TorchCheckpointIO):
    """Somebody's own way to write files, with something to look at."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saved.append(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)


def noting_in_a_thread() -> AsyncCheckpointIO:
    return AsyncCheckpointIO(Noting())


@pytest.mark.parametrize("make", ordinary([Noting, AsyncCheckpointIO, noting_in_a_thread], noting_in_a_thread))
def test_any_checkpoint_io_resumes_to_the_same_bits(make: Callable[[], Any], tmp_path: Path) -> None:
    unbroken, _ = battery.train(tmp_path / "as it is", battery.make_callback("magnitude"))
    plugin = make()
    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"), plugins=[plugin])
    assert battery.differences(unbroken, module) == []
    for path in sorted((tmp_path / "checkpoints").glob("*.ckpt")):
        resumed, _ = battery.train(
            tmp_path / path.stem, battery.make_callback("magnitude"), ckpt_path=path, plugins=[make()]
        )
        assert battery.differences(unbroken, resumed) == [], path.name
    if isinstance(plugin, Noting):
        assert len(plugin.saved) == len(trainer.strategy.checkpoint_io.saved) == battery.EPOCHS
        assert ["lightning_prune" in checkpoint for checkpoint in plugin.saved] == [False, *[True] * 4]


def test_a_checkpoint_io_that_is_set_later_carries_plans_too(tmp_path: Path) -> None:
    plugin = Noting()

    class Late(PruningCallback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            trainer.strategy.checkpoint_io = plugin
            super().setup(trainer, pl_module, stage)

    module, trainer = battery.train(tmp_path, Late(keep=0.5, round_to=2))
    assert battery.differences(module, lp.load_pruned(battery.ResidualClassifier, last(trainer))) == []
    assert len(plugin.saved) == battery.EPOCHS


def last(trainer: L.Trainer) -> str:
    return trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("weights_only", [False, True])
def test_validates_from_a_checkpoint_without_the_callback(weights_only: bool, tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    fresh, module = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False), battery.ResidualClassifier()
    (found,) = fresh.validate(module, battery.loaders()[1], ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found["val/accuracy"] == pytest.approx(float(trainer.callback_metrics["val/accuracy"]))
    assert "load_state_dict" not in vars(module)
    assert battery.differences(module, lp.load_pruned(battery.ResidualClassifier, tmp_path / "end.ckpt")) == []


def test_what_is_only_read_or_belongs_to_something_else_is_left_alone(tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path / "pruned", battery.make_callback("magnitude"))
    pruned, other = last(trainer), nn.Linear(2, 2)

    class Look(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            read = trainer.strategy.load_checkpoint(pruned)
            assert read["state_dict"]["stem.weight"].shape[0] < 12
            trainer.strategy.save_checkpoint({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
            trainer.strategy.save_checkpoint(other.state_dict(), tmp_path / "bare.ckpt")

    plain, _ = battery.train(tmp_path / "plain", Look(), max_epochs=1)
    assert plan_in_force(plain) is None
    assert plain.stem.out_channels == 12
    module, _ = battery.train(tmp_path / "both", battery.make_callback("magnitude"), Look())
    assert plan_in_force(module) is not None
    assert torch.load(tmp_path / "other.ckpt", weights_only=True).keys() == {"state_dict"}
    assert torch.load(tmp_path / "bare.ckpt", weights_only=True).keys() == {"weight", "bias"}


def test_a_restore_that_fails_gives_the_module_its_method_back(tmp_path: Path) -> None:
    class Refuses(battery.ResidualClassifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            raise KeyError("not mine")

    _, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    module = Refuses()
    with pytest.raises(KeyError, match="not mine"):
        battery.train(tmp_path / "on", module=module, ckpt_path=last(trainer))
    assert "load_state_dict" not in vars(module)
    assert plan_in_force(module) is None


def test_a_hook_may_load_other_weights_first(tmp_path: Path) -> None:
    class LoadsOthers(battery.ResidualClassifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.load_state_dict(battery.ResidualClassifier().state_dict())

    module, trainer = battery.train(tmp_path, battery.make_callback("magnitude"))
    resumed, _ = battery.train(tmp_path / "on", module=LoadsOthers(), ckpt_path=last(trainer))
    assert battery.differences(module, resumed) == []


# -- what is extended in Lightning -------------------------------------------------------------------------------------

EXTENDED = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

places = [pl.Trainer, pl.LightningModule, pl.Callback, saving, Strategy, _MultiProcessingLauncher, _CheckpointConnector]
before = [dict(vars(place)) for place in places]
import {module}
changed = [
    f"{{place.__name__}}.{{name}}" for place, kept in zip(places, before) for name, value in vars(place).items()
    if kept.get(name) is not value and not name.startswith("__abstract") and name != "_abc_impl"
]
sys.exit(", ".join(changed))
"""


@pytest.mark.parametrize(
    ("module", "extended"),
    [
        ("lightning_prune", []),
        ("lightning_prune.callbacks", ["Trainer.__init__", "lightning.pytorch.core.saving._load_state"]),
    ],
)
@pytest.mark.long
def test_what_an_import_extends(module: str, extended: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", EXTENDED.format(module=module)], capture_output=True, text=True)
    assert done.stderr.strip() == ", ".join(extended)


def test_what_is_private_in_lightning_is_as_it_was_read_in_2_6() -> None:
    assert L.__version__.startswith("2.6."), "read plan_checkpoint_io.py and extensions.py again, then raise this"
    hand_back = inspect.getsource(_MultiProcessingLauncher._collect_rank_zero_results)
    assert f'"{plan_checkpoint_io._HANDED_BACK}"' in hand_back
    assert "checkpoint_io.save_checkpoint(state_dict, weights_path)" in hand_back
    take_back = inspect.getsource(_MultiProcessingLauncher._recover_results_in_main_process)
    assert "checkpoint_io.load_checkpoint(worker_output.weights_path)" in take_back
    assert "model = _load_state(cls, checkpoint, strict=strict, **kwargs)" in inspect.getsource(
        saving._load_from_checkpoint
    )


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forked_ranks_hand_an_unpruned_network_back_to_a_parent_that_was_pruned(tmp_path: Path) -> None:
    plain, trainer = battery.train(tmp_path / "plain", max_epochs=1)
    module, _ = battery.train(tmp_path / "pruned", battery.make_callback("magnitude"))
    battery.train(tmp_path / "on", ckpt_path=last(trainer), module=module, strategy="ddp_fork", max_epochs=1)
    assert plan_in_force(module) is None
    assert battery.differences(plain, module) == []
