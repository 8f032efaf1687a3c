"""When callbacks prune, and what they say about settings that cannot work."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.callbacks import PruningCallback, TaylorRankCallback
from lightning_prune.pruning_plan import plan_in_force


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep must be the fraction that is kept, above 0 and at most 1; got 0"),
        ({"keep": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"keep": "half"}, "above 0 and at most 1; got 'half'"),
        ({"keep": float("nan")}, "above 0 and at most 1; got nan"),
        ({"metric": "macs"}, "metric must be one of flops, params, channels, latency; got 'macs'"),
        ({"start_epoch": -1}, "start_epoch must be a whole number of at least 0; got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number of at least 1; got 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"steps": 2.0}, "steps must be a whole number of at least 1; got 2.0"),
        ({"round_to": 0}, "round_to must be a whole number of at least 1; got 0"),
        ({"min_channels": 0}, "min_channels must be a whole number of at least 1; got 0"),
        ({"steps": True}, "steps must be a whole number of at least 1; got True"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_constructor(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningCallback(**settings)


def test_the_state_of_earlier_versions_is_read() -> None:
    callback = PruningCallback(steps=3)
    callback.load_state_dict({"steps_done": 2, "before": None, "batch_like": {"shape": [1, 3], "dtype": "float32"}})
    assert (callback.steps_done, callback.state.batch_like["shape"], callback.history) == (2, [1, 3], None)


def test_taylor_needs_an_epoch_to_rank() -> None:
    with pytest.raises(ValueError, match="start_epoch must be at least 1: the Taylor criterion scores during"):
        TaylorRankCallback(start_epoch=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.01, "round_to": 4}, r"keep=0.01 of the flops cannot be reached: between 0\.\d+ and 1 can be kept"),
        ({"ignore": ["layer7.*"]}, r"The ignore pattern 'layer7\.\*' matches no module"),
        ({"module": "backbone"}, "The model has no module 'backbone'; its modules are"),
        ({"module": "backbone", "example_inputs": [1, 1, 8, 8]}, "The model has no module 'backbone'"),
        ({"example_inputs": [1, 3, 8, 8]}, r"The example inputs \[\(1, 3, 8, 8\)\] do not fit the forward pass"),
        (
            {"steps": 6},
            "prunes before epochs 1 to 6 .*, but the run ends after 5 epochs; raise max_epochs to at least 7",
        ),
        ({"ignore": ["*"]}, "PruningCallback finds nothing to prune: .*ignored by the pattern"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = battery.ResidualClassifier()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        battery.train(tmp_path, PruningCallback(**settings), module=module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(key.startswith("on_") for key in module.__dict__)


def test_a_batch_without_a_tensor_first_is_no_example(tmp_path: Path) -> None:
    class Named(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"image": torch.zeros(1, 8, 8), "label": torch.tensor(0)}

    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[PruningCallback()], default_root_dir=tmp_path,
    )  # fmt: skip
    said = "No example input is to be had from a batch of type dict, as no step of ResidualClassifier works with it"
    with pytest.raises(ValueError, match=said):
        trainer.fit(battery.ResidualClassifier(), torch.utils.data.DataLoader(Named()))


def test_two_callbacks_on_one_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PruningCallback and TaylorRankCallback both prune the whole model"):
        battery.train(tmp_path, PruningCallback(), TaylorRankCallback())


class TwoParts(battery.ResidualClassifier):
    """Two stacks that are pruned by a callback each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.right = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.right(self.left(images)).mean((2, 3))


def test_two_callbacks_on_two_parts_share_one_plan(tmp_path: Path) -> None:
    callbacks = [
        PruningCallback(module="left", example_inputs=[1, 1, 8, 8], round_to=1),
        TaylorRankCallback(module="right", example_inputs=[1, 8, 4, 4], round_to=1, start_epoch=2),
    ]
    board, original = TensorBoardLogger(tmp_path, "board"), TwoParts()
    module, trainer = battery.train(tmp_path, *callbacks, module=TwoParts(), logger=board, log_every_n_steps=1)
    assert set(plan_in_force(module).widths) == {"left.0", "right.0"}
    assert module.left[0].out_channels < 16
    assert module.right[0].out_channels < 16
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["lightning_prune"]["plan"]["groups"].keys() == {"left.0", "right.0"}
    events = EventAccumulator(board.log_dir).Reload()
    for part in ("left", "right"):
        sizes = [sum(p.numel() for p in each.get_submodule(part).parameters()) for each in (module, original)]
        kept = [event.value for event in events.Scalars(f"prune/{part}/keep_params")]
        assert kept[-1] == pytest.approx(sizes[0] / sizes[1])
        assert f"prune/{part}/latency_ms" in events.Tags()["scalars"]
        assert f"prune/{part}/widths" in events.Tags()["images"]


def test_the_schedule_counts_from_the_original() -> None:
    callback = PruningCallback(keep=0.4, steps=3, start_epoch=2, every_n_epochs=2)
    assert [callback.steps_due(epoch) for epoch in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [callback.keep_after(step) for step in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert callback.last_prune_epoch == 6


def test_pruning_before_the_first_epoch(tmp_path: Path) -> None:
    module, _ = battery.train(tmp_path, PruningCallback(start_epoch=0, round_to=1), max_epochs=1)
    assert module.first.out_channels < 24


def test_a_prune_that_removes_nothing_says_so(tmp_path: Path) -> None:
    callback = PruningCallback(keep=0.99, steps=2, start_epoch=1, round_to=12, ignore=["stem", "second"])
    # One of 24 channels is more than a hundredth of the cost: the first prune takes one, the second finds that enough.
    with pytest.warns(UserWarning, match="Prune 2 of 2 has pruned nothing: the next smaller network"):
        battery.train(tmp_path, callback)


class OfStem(PruningCallback):
    """Leaves one channel of the first layer alone, of 24."""

    def make_plan(self, trainer: L.Trainer, graph: Any, keep: float) -> Any:
        return graph.plan({"stem": torch.tensor([5])}), {}


@pytest.mark.filterwarnings("ignore:Training has ended with")
def test_a_layer_that_is_left_with_hardly_any_channels_is_named(tmp_path: Path) -> None:
    callback = OfStem(round_to=1, compensate="none")
    with pytest.warns(UserWarning, match=r"Prune 1 of 1 leaves hardly any channels of stem 4\.2%, and far more of the"):
        battery.train(tmp_path, callback, module=battery.ResidualClassifier(24), max_epochs=2)


def test_scalars_have_their_documented_names(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, "board")
    battery.train(
        tmp_path, battery.make_callback("taylor"), logger=[board, CSVLogger(tmp_path, "csv")], log_every_n_steps=1
    )
    events = EventAccumulator(board.log_dir).Reload()
    names = set(events.Tags()["scalars"])
    assert {"prune/keep_flops", "prune/keep_params", "prune/keep_channels", "prune/channels/first"} <= names
    assert set(events.Tags()["histograms"]) >= {"prune/scores/stem", "prune/scores/first"}
    kept = [event.value for event in events.Scalars("prune/keep_flops")]
    assert kept[0] == 1.0
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] <= 0.5
    assert "prune/channels/first" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore:Prune . of .")
def test_the_same_run_without_pruning_sees_the_same_random_numbers(tmp_path: Path) -> None:
    """A callback that never prunes (keep=1) changes no bit of the weights."""
    plain, _ = battery.train(tmp_path / "plain")
    watched, _ = battery.train(tmp_path / "watched", TaylorRankCallback(keep=1.0, start_epoch=2))
    assert battery.differences(plain, watched) == []


def test_of_two_callbacks_each_tells_its_own_budget(tmp_path: Path) -> None:
    small = PruningCallback(keep=0.6, metric="params", module="left", example_inputs=[1, 1, 8, 8], round_to=1)
    large = PruningCallback(keep=0.8, metric="params", module="right", example_inputs=[1, 8, 4, 4], round_to=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Training has ended")
        battery.train(tmp_path, small, large, module=TwoParts(), max_epochs=2)


class Box:
    """A batch that Lightning finds no tensors in."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels


class Boxes(battery.ResumableLoader):
    def __iter__(self) -> Iterator[Box]:
        return (Box(*batch) for batch in super().__iter__())


class Boxed(battery.ResidualClassifier):
    example_input_array = torch.zeros(1, 1, 8, 8)

    def training_step(self, batch: Box, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch.images), batch.labels)


def test_a_run_whose_batches_hold_no_tensors_resumes_within_an_epoch(tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> L.LightningModule:
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                PruningCallback(round_to=1),
                ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1),
            ],
        )  # fmt: skip
        module = Boxed()
        trainer.fit(module, Boxes(battery.images(16 * battery.BATCHES), 16), ckpt_path=path)
        return module

    unbroken = fit()
    assert battery.differences(unbroken, fit(tmp_path / "step=4.ckpt")) == []


def test_a_callback_that_comes_late_says_what_it_catches_up_on(tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, max_epochs=3)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="Prunes 1 to 3 of 4 happen at once, before epoch 3: the run goes on from"):
        battery.train(tmp_path / "on", PruningCallback(keep=0.4, steps=4, round_to=1), ckpt_path=path)
