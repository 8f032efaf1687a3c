"""The plan goes wherever the weights go, with the pruning callback in the Trainer or without it."""

from pathlib import Path

import battery
import pytest
from torch import Tensor
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


class TwoViews(battery.ResidualClassifier):
    """Two forward passes of different batch sizes in a step, as semi-supervised and multi-crop training has it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        few, many = self(batch[0][:4]), self(batch[0][4:])
        return F.cross_entropy(few, batch[1][:4]) + many.softmax(1).pow(2).sum(1).mean()


@pytest.mark.parametrize("name", battery.CALLBACKS)
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
