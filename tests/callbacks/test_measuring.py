"""What is written while a callback measures is the module's own (invariant 7)."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from shortened import WAYS, ordinary
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, RLJointPruneCallback, base

pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")


def own(module: nn.Module) -> dict[str, Any]:
    """Return what another thread may look at: tensors, their identity, modes, gradients that are asked for, sizes."""
    tensors = module.state_dict(keep_vars=True)
    return {
        "identity": {key: id(value) for key, value in tensors.items()},
        "values": {key: value.detach().clone() for key, value in tensors.items()},
        "required": {key: value.requires_grad for key, value in tensors.items()},
        "modes": [submodule.training for submodule in module.modules()],
        "hooks": [len(submodule._forward_pre_hooks) for submodule in module.modules()],
        "sizes": str(module),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Name the first thing that is not as it was, or nothing."""
    for what, before in one.items():
        if what != "values" and before != other[what]:
            return what
    for key, value in one["values"].items():
        if value.shape != other["values"][key].shape or not torch.equal(value, other["values"][key]):
            return key
    return ""


class Window(Callback):
    """Compare the module with what it was when a hook of the pruning callback began, whenever `look` is called.

    It stands before and behind the pruning callback: the first opens the window, the second closes it.
    """

    def __init__(self) -> None:
        self.module: L.LightningModule | None = None
        self.expected: Any = None
        self.looks, self.wrong = 0, set()
        self.lock = threading.RLock()  # nothing is opened or closed under the eyes of who looks

    def open(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with self.lock:
            if self.module is None:
                content = own(pl_module)
                self.expected = lambda: content  # tensors by name would be taken for a copy of the weights
                self.module = pl_module
            else:
                self.module = None

    on_train_start = on_train_epoch_start = open

    def look(self) -> None:
        with self.lock:
            if self.module is not None:
                self.looks += 1
                self.wrong |= {difference(self.expected(), own(self.module))} - {""}


class Behind(Callback):
    """Close the window that another callback has opened."""

    def __init__(self, window: Window) -> None:
        self.on_train_start = self.on_train_epoch_start = window.open  # type: ignore[method-assign]


@contextmanager
def closed_while_pruning(window: Window, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    prune = base.prune_in_training

    def close_and_prune(trainer: L.Trainer, *how: Any) -> Any:
        window.open(trainer, trainer.lightning_module)  # closes it
        report = prune(trainer, *how)
        window.open(trainer, trainer.lightning_module)
        return report

    monkeypatch.setattr(base, "prune_in_training", close_and_prune)
    yield


def watched_run(callback: PruningCallback, window: Window, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_while_pruning(window, monkeypatch):
        battery.train(
            root,
            window,
            callback,
            Behind(window),
            max_epochs=max(3, callback.last_prune_epoch + 1),
            limit_train_batches=2,
        )


@pytest.mark.parametrize("name", ordinary(battery.CALLBACKS, *WAYS))
def test_at_every_call_of_a_layer_the_module_is_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, calls = Window(), itertools.count()

    def look(module: nn.Module, args: Any) -> None:
        if next(calls) % 5 == 0:  # in a thread, to which what watches the operators of this one is unknown
            looking = threading.Thread(target=window.look)
            looking.start()
            looking.join()

    handle = register_module_forward_pre_hook(look)
    try:
        watched_run(battery.make_callback(name), window, tmp_path, monkeypatch)
    finally:
        handle.remove()
    assert window.wrong == set()
    assert window.looks > 20


def test_a_thread_that_samples_during_episodes_finds_the_module_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, ended = Window(), threading.Event()

    def sample() -> None:
        while not ended.is_set():
            window.look()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        watched_run(battery.make_callback("rl_joint", start_epoch=2), window, tmp_path, monkeypatch)
    finally:
        ended.set()
        sampler.join()
    assert window.wrong == set()
    assert window.looks > 0


def test_checkpoints_written_by_what_measures_load(tmp_path: Path) -> None:
    """As a signal handler would write them, in the thread that measures."""
    trainers: list[L.Trainer] = []
    expected: dict[str, Tensor] = {}

    class Note(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainers.append(trainer)
            expected.clear()
            expected.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    written = 0  # before the prune: what is measured when it is over is another network

    def evaluate(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        nonlocal written
        if expected and callback.steps_done == 0:
            path = tmp_path / f"{written}.ckpt"
            trainers[0].save_checkpoint(path)
            saved = torch.load(path, weights_only=True)["state_dict"]
            assert all(torch.equal(saved[key], value) for key, value in expected.items())
            assert (
                battery.differences(lp.load_pruned(battery.ResidualClassifier, path), trainers[0].lightning_module)
                == []
            )
            written += 1
        output = model(batch[0])
        return F.cross_entropy(output, batch[1]), (output.argmax(1) == batch[1]).float().mean()

    callback = RLJointPruneCallback(
        keep=0.5, start_epoch=1, warmup_epochs=0, round_to=2, episodes=2, evaluate=evaluate, limit_batches=1,
        search_settings={"agent_updates": 1, "environment_updates": 1, "environment_size": 4},
    )  # fmt: skip
    battery.train(tmp_path, Note(), callback, max_epochs=2, limit_train_batches=1)
    assert written > 2


class Stateful(battery.ResidualClassifier):
    """A module that counts in a buffer, keeps what it has seen, and makes a hook on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.head._forward_hooks:
            self.head.register_forward_hook(lambda module, args, output: self.seen.append(output))
        self.seen.clear()
        self.passes += 1
        output = super().forward(images)
        assert self.seen[-1] is output
        return output


def test_measuring_leaves_no_trace_in_what_is_trained(tmp_path: Path) -> None:
    """A run that measures without pruning ends like one that does not measure at all."""

    class OnlyMeasures(RLJointPruneCallback):
        def begin_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.measure([self.run.graph.plan({name: torch.arange(2)}) for name in self.run.graph.groups])

    measuring = OnlyMeasures(keep=0.5, start_epoch=9, round_to=2)
    one, other = Stateful(), Stateful()
    other.load_state_dict(one.state_dict())
    measuring.start_epoch, measuring.warmup_epochs = 1, 0
    measuring.steps_due = lambda epoch: 0  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="Training has ended with 1.000"):
        battery.train(tmp_path / "1", measuring, module=one, max_epochs=2)
    battery.train(tmp_path / "2", module=other, max_epochs=2)
    assert battery.differences(one, other) == []
