"""Wrong uses from Python, and the one sentence that each gets: what is wrong, and what to do."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.export import export

IMAGE = torch.zeros(1, 1, 8, 8)
PLAIN: dict[str, Any] = {"criterion": "l1", "compensate": "none"}


def net() -> battery.ResidualClassifier:
    return battery.ResidualClassifier()


def planned(**settings: Any) -> Any:
    graph = lp.trace(net(), IMAGE)
    return lp.plan(graph, lp.criteria.magnitude(graph), **settings)


def on_regression(name: str) -> Callable[[Path], Any]:
    """Return what trains a network of one output on whole numbers."""

    class Regression(battery.ResidualClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(batch[0])[:, 0] - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/mse", self.training_step(batch, batch_idx))

    def run(root: Path) -> None:
        loader = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16)), 8)
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callback = battery.make_callback(name)
        L.Trainer(max_epochs=5, accelerator="cpu", callbacks=[callback], default_root_dir=root, **settings).fit(
            Regression(), loader, loader
        )

    return run


def text_file(root: Path) -> Any:
    (root / "text.ckpt").write_text("hello")
    return lp.load_pruned(battery.ResidualClassifier, root / "text.ckpt")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a text file": (text_file, "text.ckpt' cannot be read as a checkpoint: the file is damaged, or was not written by"),
    "path first": (lambda root: lp.load_pruned("a.ckpt", battery.ResidualClassifier), "load_pruned takes a class or"),
    "three channels": (
        lambda root: export(net(), torch.zeros(1, 3, 8, 8), root / "a.pt"),
        "Inputs of shape (1, 3, 8, 8) do not fit ResidualClassifier (",
    ),
    "and what fits": (
        lambda root: export(net(), torch.zeros(1, 3, 8, 8), root / "a.pt"),
        "its first layer, 'stem', is Conv2d(1, 12",
    ),
    "no such module": (
        lambda root: lp.trace(net(), IMAGE, module="frst"),
        "has no module 'frst'; its modules are 'first', ",
    ),
    "no such pattern": (
        lambda root: lp.trace(net(), IMAGE, ignore=["hed.*"]),
        "The ignore pattern 'hed.*' matches no module of the model; its modules are 'head', ",
    ),
    "min_channels": (
        lambda root: planned(min_channels=100),
        "min_channels=100 is above every width, of which the greatest is 24, so that nothing can be pruned; lower min",
    ),
    "the same twice": (
        lambda root: L.Trainer(callbacks=[PruningCallback(**PLAIN), PruningCallback(0.3, **PLAIN)], logger=False),
        "Two callbacks PruningCallback prune the whole model; keep one of them, or give each a submodule of its own",
    ),
    **{
        f"{name} on a regression": (on_regression(name), "name another metric that validation_step logs with `monitor`")
        for name in ("sensitiveness", "rl_joint", "learn_to_prune")
    },
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_use_gets_its_sentence(kind: str, tmp_path: Path) -> None:
    use, message = WRONG[kind]
    with pytest.raises((ValueError, TypeError)) as raised:
        use(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_callbacks_for_different_submodules_are_fine(tmp_path: Path) -> None:
    both = [PruningCallback(module="first"), PruningCallback(module="second")]
    L.Trainer(callbacks=both, logger=False, default_root_dir=tmp_path, accelerator="cpu")


def test_a_single_optimizer_is_taken() -> None:
    model = net()
    graph = lp.trace(model, IMAGE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), 0.5, round_to=1), optimizers=optimizer)
    assert optimizer.param_groups[0]["params"][0].shape[0] == model.stem.out_channels


def test_a_second_plan_of_the_same_budget_says_that_nothing_is_pruned() -> None:
    model = net()
    graph = lp.trace(model, IMAGE)
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=1))
    again = lp.trace(model, IMAGE)
    with pytest.warns(UserWarning, match=r"keep=0.5 prunes nothing: fractions are of the original network, of whose"):
        kept = lp.plan(again, lp.criteria.magnitude(again), keep=0.5, round_to=1).budget["achieved"]
    assert kept <= 0.5


@pytest.mark.parametrize("ending", [".pt", ".pt2"])
def test_a_full_disk_is_told_before_anything_is_written(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(
        OSError, match=rf"No space is left for '.*model{ending}': it takes about 0.2 MB, and 0.0 MB are"
    ):
        export(net(), IMAGE, tmp_path / f"model{ending}")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_of_logs_is_named_where_nothing_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = PruningCallback(0.5, round_to=2, save_result=False, **PLAIN)
    with caplog.at_level("INFO"):
        battery.train(tmp_path, callback, max_epochs=2)
    assert "parameters" in caplog.text
    assert "logs:" not in caplog.text


def test_a_budget_that_rounding_leaves_much_of_names_the_group_and_round_to() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))  # half the cost with each step
    graph = lp.trace(model, torch.zeros(1, 4))
    with pytest.warns(UserWarning, match="lower round_to") as told:
        kept = lp.plan(graph, lp.criteria.magnitude(graph), keep=0.6, round_to=8).budget["achieved"]
    assert kept == 9 / 16
    assert [str(one.message) for one in told] == [
        "0.562 of the flops is kept where keep=0.600 was asked for, with '0' alone at a multiple of 1: one step of "
        "round_to=8 in '0' is 0.438 of the cost; lower round_to."
    ]
    assert lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=8).budget["achieved"] == 0.5
