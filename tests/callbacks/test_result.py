"""The file that is named is the pruned network: what settings of ModelCheckpoint leave behind, and what is told."""

import copy
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import battery
import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.files import Unread, read_without_objects
from lightning_prune.pruning_plan import plan_in_force

LOSSES = [0.0, 0.1, 0.5, 0.3, 0.4, 0.6]  # of each epoch: best before the prunes, and after the last one in epoch 3
END = len(LOSSES) - 1


class Small(L.LightningModule):
    """Says what its validation loss is; prunes come before epochs 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", LOSSES[self.current_epoch])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Epochs(L.Callback):
    """Keep the network as each epoch has left it."""

    def __init__(self) -> None:
        self.after: dict[int, nn.Module] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after[trainer.current_epoch] = copy.deepcopy(pl_module)


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(32.0).view(8, 4) / 32), 4)


def pruning(**settings: Any) -> PruningCallback:
    return PruningCallback(**{"keep": 0.5, "steps": 2, "round_to": 1, **settings})


class Ran(NamedTuple):
    module: L.LightningModule
    trainer: L.Trainer
    callback: PruningCallback
    after: dict[int, nn.Module]

    def epoch_in(self, path: str) -> int | None:
        """Return the last epoch after which the network was what a file holds; None without a file."""
        if not path:
            return None
        loaded = lp.load_pruned(Small, path)
        same = [number for number, kept in self.after.items() if battery.differences(kept, loaded) == []]
        assert len(same) == 1
        return same[0]


def run(
    root: Path, *others: L.Callback, prune: PruningCallback | None = None, path: Any = None,
    module: L.LightningModule | None = None, **settings: Any,
) -> Ran:  # fmt: skip
    callback, epochs, module = prune or pruning(), Epochs(), module or Small()
    usual: dict[str, Any] = {
        "max_epochs": len(LOSSES), "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = L.Trainer(callbacks=[callback, epochs, *others], **{**usual, **settings})
    trainer.fit(module, data(), data(), ckpt_path=path)
    return Ran(module, trainer, callback, epochs.after)


class Row(NamedTuple):
    """What is set, and after which epoch the network is in the best and the last file, and what the result is named."""

    savers: list[dict[str, Any]]
    best: int | None
    last: int | None
    result: str
    trainer: dict[str, Any] = {}  # noqa: RUF012


PRUNED, DEFAULT = "pruned.ckpt", "epoch=5-step=12.ckpt"
BY_LOSS = {"monitor": "val_loss"}
TABLE: dict[str, Row] = {
    "nothing set": Row([{}], 5, None, DEFAULT),
    "save_last": Row([{"save_last": True}], 5, 5, "last.ckpt"),
    "save_last=link": Row([{"save_last": "link"}], 5, 5, "last.ckpt"),
    "monitor": Row([BY_LOSS], 3, None, PRUNED),
    "monitor, save_last": Row([{**BY_LOSS, "save_last": True}], 3, 3, PRUNED),
    "monitor, save_last=link": Row([{**BY_LOSS, "save_last": "link"}], 3, 3, PRUNED),
    "best two, save_last": Row([{**BY_LOSS, "save_top_k": 2, "save_last": True}], 3, 4, PRUNED),
    "all, monitor": Row([{**BY_LOSS, "save_top_k": -1}], 3, None, DEFAULT),
    "none": Row([{"save_top_k": 0}], None, None, PRUNED),
    "none, save_last": Row([{"save_top_k": 0, "save_last": True}], None, 5, "last.ckpt"),
    "every fifth epoch, save_last": Row([{"every_n_epochs": 5, "save_last": True}], 4, 4, PRUNED),
    "epochs before the last prune alone": Row(
        [{"every_n_epochs": 2, "save_last": True}], 2, 2, "last.ckpt", {"max_epochs": 3}
    ),
    "the same, as a link": Row([{"every_n_epochs": 2, "save_last": "link"}], 2, 2, "last.ckpt", {"max_epochs": 3}),
    "the same, without a last": Row([{"every_n_epochs": 2}], 2, None, PRUNED, {"max_epochs": 3}),
    "weights only, monitor, save_last": Row([{**BY_LOSS, "save_weights_only": True, "save_last": True}], 3, 3, PRUNED),
    "now and then": Row([{"train_time_interval": timedelta(days=1)}], 5, None, PRUNED),
    "all the time": Row([{"train_time_interval": timedelta(0)}], 5, None, DEFAULT),
    "one name": Row([{"filename": "best", "save_last": True}], 5, 5, "last.ckpt"),
    "one name, monitor": Row([{**BY_LOSS, "filename": "best", "save_last": True}], 3, 3, PRUNED),
    "every eighth step": Row([{"every_n_train_steps": 8}], 3, None, PRUNED),
    "a metric that is never logged": Row([{"monitor": "loss"}], 5, None, PRUNED, {"limit_val_batches": 0}),
    "several": Row([{**BY_LOSS, "filename": "best"}, {"save_top_k": 0, "save_last": True}], 3, None, "last.ckpt"),
    "no checkpoints": Row([], None, None, PRUNED, {"enable_checkpointing": False}),
    "written in another thread": Row([BY_LOSS], 3, None, PRUNED, {"plugins": AsyncCheckpointIO()}),
}


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize("name", TABLE)
def test_what_each_file_holds(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = TABLE[name]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        ran = run(
            tmp_path, *(ModelCheckpoint(tmp_path / "checkpoints", **saver) for saver in row.savers), **row.trainer
        )
    saver: Any = ran.trainer.checkpoint_callback
    end = max(ran.after)
    best, last = (ran.epoch_in(getattr(saver, f"{which}_model_path", "")) for which in ("best", "last"))
    assert (best, last) == (row.best, row.last)
    result = Path(ran.callback.result_path)
    assert (result.parent, result.name) == (tmp_path / "checkpoints", row.result)
    assert ran.epoch_in(str(result)) == end
    assert (tmp_path / "checkpoints" / PRUNED).exists() == (row.result == PRUNED)
    if "one name" in name:
        assert {path.name for path in result.parent.iterdir()} == {"best.ckpt", "last.ckpt", row.result}
    assert f"checkpoint: {result}\n" in caplog.text
    assert plan_in_force(lp.load_pruned(Small, result)) == plan_in_force(ran.module)
    if saver is not None and saver.best_model_path:
        ran.trainer.test(ran.module, data(), ckpt_path="best", verbose=False)
        assert plan_in_force(ran.module) == plan_in_force(ran.after[end])


# -- the other ways in which a run may go ------------------------------------------------------------------------------


class Stop(L.Callback):
    """Press Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step % 2 == 1:
            raise KeyboardInterrupt


def test_a_run_that_is_interrupted_leaves_the_network_as_it_is_then(tmp_path: Path) -> None:
    callback, module = pruning(), Small()
    with pytest.raises(SystemExit):
        run(tmp_path, Stop(3), ModelCheckpoint(tmp_path, **BY_LOSS), prune=callback, module=module)
    assert callback.result_path == str(tmp_path / PRUNED)
    assert battery.differences(module, lp.load_pruned(Small, callback.result_path)) == []
    resumed = run(tmp_path, path=callback.result_path)
    assert sorted(resumed.after) == [3, 4, 5]
    assert plan_in_force(resumed.module) == plan_in_force(module)


def test_an_interrupted_run_ends_with_what_resumes_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True}
    for epoch, told in (
        (0, "No checkpoint has been written yet from which the run could go on: start it anew."),
        (1, "resume: trainer.fit(Small(...), ckpt_path='{}')"),
        (3, "resume: trainer.fit(Small(...), ckpt_path='{}')"),
    ):
        folder, saver = tmp_path / str(epoch), ModelCheckpoint(tmp_path / str(epoch))
        callback = pruning(start_epoch=2)
        with caplog.at_level("INFO"), pytest.raises(SystemExit):
            run(folder, Stop(epoch), saver, prune=callback, **settings)
        path = callback.result_path or saver.best_model_path
        assert caplog.messages[-1] == told.format(path)
        if path:
            assert max(run(folder / "resumed", prune=pruning(start_epoch=2), path=path).after) == 5


def test_an_average_and_what_it_is_one_of_are_in_the_file_of_an_interrupted_run(tmp_path: Path) -> None:
    callback, module = pruning(), Small()
    with pytest.raises(SystemExit):
        run(tmp_path, EMAWeightAveraging(decay=0.9), Stop(3), prune=callback, module=module)
    content = torch.load(callback.result_path, weights_only=True)
    assert all(torch.equal(value, content["current_model_state"][name]) for name, value in module.state_dict().items())


def test_a_run_that_is_interrupted_before_a_prune_writes_nothing(tmp_path: Path) -> None:
    callback = pruning()
    with pytest.raises(SystemExit):
        run(tmp_path, Stop(0), prune=callback, enable_checkpointing=False)
    assert callback.result_path == ""
    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.parametrize(
    ("made", "settings"), [({}, {"fast_dev_run": 2}), ({"save_result": False}, {"enable_checkpointing": False})]
)
def test_nothing_is_written_where_nothing_is_asked_for(
    made: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    ran = run(tmp_path, prune=pruning(**made), **settings)
    assert plan_in_force(ran.module) is not None
    assert ran.callback.result_path == ""
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_file_that_is_there_is_named_without_writing_one(tmp_path: Path) -> None:
    ran = run(tmp_path, ModelCheckpoint(tmp_path), prune=pruning(save_result=False))
    assert ran.callback.result_path == ran.trainer.checkpoint_callback.best_model_path


def test_monitors_that_start_anew_do_so_in_a_run_that_is_resumed(tmp_path: Path) -> None:
    def savers() -> list[ModelCheckpoint]:
        every = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
        return [ModelCheckpoint(tmp_path / "best", monitor="val_loss"), every]

    unbroken = run(tmp_path, *savers())
    for epoch in (1, 4):  # before the last prune, and after it
        resumed = run(tmp_path, *savers(), path=tmp_path / "all" / f"epoch={epoch}.ckpt")
        assert unbroken.epoch_in(resumed.trainer.checkpoint_callback.best_model_path) == 3
        assert unbroken.epoch_in(resumed.callback.result_path) == END


def test_monitors_go_on_where_that_is_asked_for(tmp_path: Path) -> None:
    saver, stopping = ModelCheckpoint(tmp_path, **BY_LOSS), EarlyStopping("val_loss", patience=4)
    ran = run(tmp_path, saver, stopping, prune=pruning(reset_monitors=False))
    assert ran.epoch_in(saver.best_model_path) == 0
    assert stopping.stopped_epoch == 4
    assert ran.epoch_in(ran.callback.result_path) == 4
    with pytest.warns(UserWarning, match=r"epoch=0-step=2.ckpt' is one of a larger network: Small, which has been pru"):
        ran.trainer.test(ran.module, data(), ckpt_path="best", verbose=False)
    assert plan_in_force(ran.module) is None


@pytest.mark.parametrize(("mode", "patience", "stopped"), [("min", 2, 5), ("max", 1, 3)])
def test_early_stopping_counts_from_the_last_prune(mode: str, patience: int, stopped: int, tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=patience, mode=mode)
    run(tmp_path, stopping, enable_checkpointing=False)
    assert stopping.stopped_epoch == stopped


class Waits(Small):
    """Takes the learning rate down where the loss has not been better for more than three epochs."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize(("anew", "best", "rate"), [(True, 0.3, 0.1), (False, 0.0, 0.01)])
def test_a_plateau_is_one_of_the_network_since_the_last_prune(
    anew: bool, best: float, rate: float, tmp_path: Path
) -> None:
    ran = run(tmp_path, prune=pruning(reset_monitors=anew), module=Waits(), enable_checkpointing=False)
    (config,) = ran.trainer.lr_scheduler_configs
    assert config.scheduler.best == pytest.approx(best)
    assert ran.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


class Parts(Small):
    """Two parts that are pruned by a callback each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x))


def test_several_pruning_callbacks_share_a_file(tmp_path: Path) -> None:
    second = pruning(module="other", example_inputs=[1, 2], steps=1, start_epoch=3)
    ran = run(tmp_path, second, prune=pruning(module="net", example_inputs=[1, 4]), module=Parts())
    assert ran.callback.result_path == second.result_path == ran.trainer.checkpoint_callback.best_model_path
    ran = run(tmp_path, second, prune=ran.callback, module=Parts(), enable_checkpointing=False)
    assert ran.callback.result_path == second.result_path == str(tmp_path / "checkpoints" / PRUNED)
    assert battery.differences(ran.module, lp.load_pruned(Parts, second.result_path)) == []


def test_averages_are_what_is_in_memory_at_the_end(tmp_path: Path) -> None:
    ran = run(tmp_path, EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, **BY_LOSS))
    assert battery.differences(ran.module, lp.load_pruned(Small, ran.callback.result_path)) == []


def test_a_second_run_writes_beside_the_first(tmp_path: Path) -> None:
    first = run(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0))
    second = run(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0))
    assert second.callback.result_path == str(tmp_path / "pruned-v1.ckpt")
    for ran in (first, second):
        assert ran.epoch_in(ran.callback.result_path) == END


class Backwards(TorchCheckpointIO):
    """A format that ``torch.load`` knows nothing of."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        Path(path).write_bytes(Path(path).read_bytes()[::-1])

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        there = Path(path).with_suffix(".there")
        there.write_bytes(Path(path).read_bytes()[::-1])
        return super().load_checkpoint(there, *args, **kwargs)


def test_files_of_another_format_are_read_back_by_what_has_written_them(tmp_path: Path) -> None:
    ran = run(tmp_path, ModelCheckpoint(tmp_path, **BY_LOSS), plugins=Backwards())
    assert ran.callback.result_path == str(tmp_path / PRUNED)


class Breaks(TorchCheckpointIO):
    """Fail, or write something else, where the result belongs."""

    def __init__(self, write: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.write = write

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(self.write(checkpoint) if Path(path).name == PRUNED else checkpoint, path)


def no_space(checkpoint: dict[str, Any]) -> dict[str, Any]:
    raise OSError("No space left on device")


def zeros(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {**checkpoint, "state_dict": {name: 0 * value for name, value in checkpoint["state_dict"].items()}}


@pytest.mark.parametrize(
    ("write", "why"), [(no_space, "No space left on device"), (zeros, "what was read back is not what is in memory")]
)
def test_a_file_that_cannot_be_written_is_told_of(write: Any, why: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"could not be written to '.*pruned.ckpt' \({why}\); it is in memory still"):
        ran = run(tmp_path, ModelCheckpoint(tmp_path, **BY_LOSS), plugins=Breaks(write))
    assert ran.callback.result_path == ""
    assert ran.epoch_in(ran.trainer.checkpoint_callback.best_model_path) == 3


class Broken(Small):
    """Ends with weights that are not numbers."""

    def on_train_end(self) -> None:
        self.net[2].weight.data[0, 0] = torch.nan


def test_weights_that_are_not_numbers_are_found_in_the_file(tmp_path: Path) -> None:
    ran = run(tmp_path, ModelCheckpoint(tmp_path), module=Broken())
    assert ran.callback.result_path == str(tmp_path / PRUNED)


class HoldsObjects(Small):
    """Its checkpoints hold what is no plain value."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_checkpoints_with_objects_are_read_back_too(tmp_path: Path) -> None:
    ran = run(tmp_path, module=HoldsObjects(nn.Linear(1, 1)), enable_checkpointing=False)
    content = read_without_objects(ran.callback.result_path)
    assert isinstance(content["hyper_parameters"]["net"], Unread)
