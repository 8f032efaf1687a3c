"""Every callback of the library, through the same checks."""

import copy
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import battery
import lightning as L
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery.masks import mask

pytestmark = pytest.mark.parametrize("name", battery.CALLBACKS)
EXAMPLE = torch.zeros(1, 1, 8, 8)


def flops(model: nn.Module) -> int:
    return FlopCountAnalysis(model.eval(), EXAMPLE).unsupported_ops_warnings(False).total()


def test_trains_and_meets_its_budget(name: str, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback(name))
    ratio = flops(module) / flops(battery.ResidualClassifier())
    assert 0.4 < ratio <= 0.5
    assert trainer.callback_metrics["prune/keep_flops"] == pytest.approx(ratio, abs=1e-6)
    assert trainer.callback_metrics["val/accuracy"] > 0.5  # four classes: chance is 0.25


def test_every_live_parameter_is_trained_after_the_last_prune(name: str, tmp_path: Path) -> None:
    seen: dict[str, Tensor] = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if trainer.current_epoch == battery.EPOCHS - 1 and not seen:
                seen.update({key: value.detach().clone() for key, value in pl_module.named_parameters()})

    module, trainer = battery.train(tmp_path, battery.make_callback(name), Watch())
    live = dict(module.named_parameters())
    assert [id(p) for p in trainer.optimizers[0].param_groups[0]["params"]] == [id(p) for p in live.values()]
    assert [key for key, value in live.items() if torch.equal(value, seen[key])] == []


@pytest.mark.parametrize("moments", [{}, {"every_n_train_steps": 4}], ids=["epochs", "steps"])
def test_stopped_equals_unbroken(name: str, moments: dict[str, int], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}-{step}", save_top_k=-1, **moments)
    unbroken, _ = battery.train(tmp_path, battery.make_callback(name), saver)
    paths = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(paths) >= battery.EPOCHS
    for path in paths:
        resumed, _ = battery.train(tmp_path / path.stem, battery.make_callback(name), ckpt_path=path)
        assert battery.differences(unbroken, resumed) == [], path.name


def test_a_callback_whose_run_broke_off_knows_nothing_of_it_in_the_next(name: str, tmp_path: Path) -> None:
    class BreakOff(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.current_epoch == 1 and trainer.global_step % battery.BATCHES == 2:
                raise ValueError("broken off")

    settings = {"start_epoch": 2, "steps": 1}  # after the run breaks off, all but ranks and searches
    callback, other = battery.make_callback(name, **settings), battery.ResidualClassifier(16)
    with pytest.raises(ValueError, match="broken off"):
        battery.train(tmp_path / "other", callback, BreakOff(), module=other, max_epochs=4)
    used, _ = battery.train(tmp_path / "used", callback, max_epochs=4)
    unused, _ = battery.train(tmp_path / "unused", battery.make_callback(name, **settings), max_epochs=4)
    assert battery.differences(used, unused) == []


def test_one_step_after_a_prune_equals_the_sliced_step_of_the_masked_twin(name: str, tmp_path: Path) -> None:
    """Both twins take the same step in float64; what the prune left must be what the mask left."""
    found: dict[str, float] = {}
    callback = battery.make_callback(name, steps=1)

    class Before(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                twin = copy.deepcopy(pl_module)
                optimizer = twin.configure_optimizers()["optimizer"]
                optimizer.load_state_dict(copy.deepcopy(trainer.optimizers[0].state_dict()))
                self.twin, self.optimizer = twin, optimizer

    class After(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch != 1:
                return
            plan = plan_in_force(pl_module)
            twin, small = before.twin, copy.deepcopy(pl_module)
            optimizer = small.configure_optimizers()["optimizer"]
            optimizer.load_state_dict(copy.deepcopy(trainer.optimizers[0].state_dict()))
            mask(lp.trace(twin, EXAMPLE.double()), plan)
            batch = [images.double() if images.is_floating_point() else images for images in next(iter(loader))]
            for model, stepper in ((twin, before.optimizer), (small, optimizer)):
                stepper.zero_grad()
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                stepper.step()
            index = plan.index()
            for key, value in twin.named_parameters():
                for axis, stays in index.get(key, {}).items():
                    value = value.index_select(axis, stays)
                found[key] = float((value - small.get_parameter(key)).abs().max())

    before, loader = Before(), battery.loaders()[0]
    battery.train(tmp_path, before, callback, After(), precision="64-true", max_epochs=2)
    assert len(found) == len(list(battery.ResidualClassifier().parameters()))
    assert max(found.values()) <= 1e-12, found


def test_two_ranks_agree_to_the_last_bit(name: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    script = Path(__file__).with_name("two_ranks.py")
    path = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*launch, str(script), name, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["difference"] == ranks[1]["difference"] == 0.0
    assert ranks[0]["digest"] == ranks[1]["digest"]
    # The same data in one process, in float64: without batch normalisation it sums the same gradients.
    plain = battery.ResidualClassifier(norm=False)
    alone, _ = battery.train(tmp_path / "alone", battery.make_callback(name), module=plain, precision="64-true")
    assert ranks[0]["widths"] == plan_in_force(alone).widths
    assert ranks[0]["digest"] == plan_in_force(alone).digest


def test_reloads_without_a_trainer(name: str, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback(name))
    path = trainer.checkpoint_callback.best_model_path
    for source in (battery.ResidualClassifier, battery.ResidualClassifier()):
        loaded = lp.load_pruned(source, path)
        assert battery.differences(module, loaded) == []
        images = battery.images(8).tensors[0]
        torch.testing.assert_close(loaded(images), module.eval()(images), rtol=0, atol=0)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lightning_prune"].keys() == {"plan", "aliases"}


def test_validates_tests_and_predicts_from_the_checkpoint(name: str, tmp_path: Path) -> None:
    _, trainer = battery.train(tmp_path, battery.make_callback(name))
    path, loader = trainer.checkpoint_callback.best_model_path, battery.loaders()[1]
    reached = float(trainer.callback_metrics["val/accuracy"])
    fresh = L.Trainer(
        accelerator="cpu", callbacks=[battery.make_callback(name)], logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    (validated,) = fresh.validate(battery.ResidualClassifier(), loader, ckpt_path=path, verbose=False)
    (tested,) = fresh.test(battery.ResidualClassifier(), loader, ckpt_path=path, verbose=False)
    predicted = torch.cat(fresh.predict(battery.ResidualClassifier(), loader, ckpt_path=path))
    assert validated["val/accuracy"] == tested["val/accuracy"] == pytest.approx(reached)
    right = (predicted.argmax(1) == loader.dataset.tensors[1]).float().mean()
    assert float(right) == pytest.approx(reached)


def test_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    callback = battery.make_callback(name)
    module, _ = battery.train(tmp_path, callback)
    hooks = [
        key
        for child in module.modules()
        for key, held in child.__dict__.items()
        if "hook" in key and held and key[0] == "_"
    ]
    assert hooks == []
    assert {type(child) for child in module.modules()} == {
        type(child) for child in battery.ResidualClassifier().modules()
    }
    assert not any(key.startswith("on_") for key in module.__dict__)
    assert not any(isinstance(value, nn.Module) for value in callback.__dict__.values())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert battery.differences(module, twin) == []
    assert pickle.loads(pickle.dumps(callback)).state_dict().keys() == callback.state_dict().keys()


def test_exports(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module, _ = battery.train(tmp_path, battery.make_callback(name))
    images = battery.images(4).tensors[0]
    expected = module.eval()(images).detach()
    path = tmp_path / "pruned.onnx"
    torch.onnx.export(module, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(module.eval(), (images,))
    torch.testing.assert_close(exported.module()(images), expected)


def test_a_second_fit_goes_on_from_the_pruned_network(name: str, tmp_path: Path) -> None:
    callback = battery.make_callback(name)
    module, _ = battery.train(tmp_path, callback)
    before = plan_in_force(module)
    battery.train(tmp_path / "again", callback, module=module)
    assert plan_in_force(module) == before
    assert flops(module) / flops(battery.ResidualClassifier()) <= 0.5


def test_the_same_callback_prunes_another_module_too(name: str, tmp_path: Path) -> None:
    callback = battery.make_callback(name)
    first, _ = battery.train(tmp_path / "first", callback)
    second, _ = battery.train(tmp_path / "second", callback)
    assert battery.differences(first, second) == []


def _run_to_the_end(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    # Every 5 of 6 batches: Lightning itself, without any of our callbacks, does not resume to the same bits from a
    # checkpoint of a run that was resumed from one written right after the last batch of an epoch.
    saver = ModelCheckpoint(
        root / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=5, enable_version_counter=False
    )
    paths = sorted((root / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    module, _ = battery.train(
        root, battery.make_callback(name), saver, ckpt_path=paths[-1] if paths else None, inference_mode=True
    )
    torch.save(module.state_dict(), root / "end.partial")
    (root / "end.partial").rename(root / "end.pt")


def _kill_and_resume(name: str, root: Path, kills: int) -> None:
    """Kill runs at random moments after a new checkpoint has appeared, until that has been done often enough."""
    context, chance, killed, runs = multiprocessing.get_context("spawn"), random.Random(name), 0, 0
    _run_to_the_end(name, root / "unbroken")
    expected = torch.load(root / "unbroken" / "end.pt", weights_only=True)
    while killed < kills:
        here = root / f"run{runs}"
        while killed < kills and not (here / "end.pt").exists():
            process = context.Process(target=_run_to_the_end, args=(name, here))
            before = len(list(here.glob("checkpoints/*.ckpt")))
            process.start()
            while process.is_alive() and len(list(here.glob("checkpoints/*.ckpt"))) == before:
                time.sleep(0.005)
            process.join(chance.uniform(0.0, 0.25))
            killed += process.is_alive()
            process.kill()
            process.join()
            for path in here.glob("checkpoints/*.ckpt"):
                torch.load(path, weights_only=True)  # none is half-written
        if not (here / "end.pt").exists():
            _run_to_the_end(name, here)
        end = torch.load(here / "end.pt", weights_only=True)
        assert all(torch.equal(end[key], value) for key, value in expected.items()), f"run {runs}, {killed} kills"
        runs += 1


def test_killed_and_resumed_equals_unbroken(name: str, tmp_path: Path) -> None:
    _kill_and_resume(name, tmp_path, kills=2)


@pytest.mark.long
def test_killed_twenty_times_and_resumed_equals_unbroken(name: str, tmp_path: Path) -> None:
    _kill_and_resume(name, tmp_path, kills=20)
