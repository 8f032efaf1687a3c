"""Every callback of the library, through the same checks."""

import copy
import pickle
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import battery
import lightning as L
import pytest
import torch
from engine import counted_flops
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import warm
from shortened import WAYS, ordinary
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.graph.resized import as_written
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.surgery.masks import mask

# The tests of a row share a run. That of blocks is for the long run: `graph/test_blocks.py` has what is its own.
ROWS = pytest.mark.parametrize(
    "name",
    ordinary(battery.CALLBACKS, *(name for name in battery.CALLBACKS if name != "blocks")),
    scope="module",
)
# Where rows differ little in what is checked, the ordinary suite has one for each way of finding a plan, or network.
SOME_ROWS = pytest.mark.parametrize(
    "name",
    ordinary(battery.CALLBACKS, "default", "taylor", "rl_joint"),
    scope="module",
)
NETWORKS = pytest.mark.parametrize("name", ordinary(battery.CALLBACKS, "default", "rl_joint", "vit"), scope="module")
STOPS = ordinary(
    [(name, moments) for name in battery.CALLBACKS for moments in ("epochs", "steps")],
    *[(name, "steps") for name in WAYS],
    ("vit", "epochs"), ("taylor", "epochs"),
)  # fmt: skip
EXAMPLE = torch.zeros(1, 1, 8, 8)
# In steps of two channels some rows come to their budget in fewer than three prunes.
pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")


def flops(model: nn.Module) -> int:
    return counted_flops(model, EXAMPLE)


class Watch(L.Callback):
    """Note the weights at the start of the last epoch."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.current_epoch == battery.EPOCHS - 1 and not self.weights:
            self.weights = {key: value.detach().clone() for key, value in pl_module.named_parameters()}


@dataclass
class Run:
    """One run of a row from beginning to end, for all tests that only read it."""

    module: L.LightningModule
    trainer: L.Trainer
    callback: PruningCallback
    last_epoch: Watch
    epochs: list[Path]  # a checkpoint after each epoch
    steps: list[Path]  # a checkpoint after every fourth step

    @property
    def checkpoint(self) -> Path:
        return self.epochs[-1]


@pytest.fixture(scope="module")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp(name)
    callback, watch = battery.make_callback(name), Watch()
    savers = [
        ModelCheckpoint(root / "epochs", filename="{epoch}", save_top_k=-1),
        ModelCheckpoint(root / "steps", filename="{step:02d}", save_top_k=-1, every_n_train_steps=4),
    ]
    module, trainer = battery.train(root, callback, watch, *savers, module=battery.network_of(name))
    paths = [sorted((root / folder).glob("*.ckpt")) for folder in ("epochs", "steps")]
    yield Run(module, trainer, callback, watch, *paths)
    assert battery.differences(module, lp.load_pruned(battery.network_of(name), paths[0][-1])) == []  # only read


@ROWS
def test_trains_and_meets_its_budget(name: str, run: Run) -> None:
    ratio = flops(run.module) / flops(battery.network_of(name)())
    assert 0.4 < ratio <= 0.5
    assert run.trainer.callback_metrics["prune/keep_flops"] == pytest.approx(ratio, abs=1e-6)
    assert run.trainer.callback_metrics["val/accuracy"] > 0.5  # four classes: chance is 0.25


@ROWS
def test_every_kept_parameter_is_trained_after_the_last_prune(run: Run) -> None:
    kept, before = dict(run.module.named_parameters()), run.last_epoch.weights
    assert [id(p) for p in run.trainer.optimizers[0].param_groups[0]["params"]] == [id(p) for p in kept.values()]
    there = {key: value for key, value in kept.items() if value.numel()}  # what is left of a block has no numbers
    assert [key for key, value in there.items() if torch.equal(value, before[key])] == []


@pytest.mark.parametrize("name", ["momentum_encoder"], scope="module")
def test_an_average_inside_the_module_is_pruned_along(run: Run) -> None:
    for average, network in (("momentum", "online"), ("momentum_projector", "projector")):
        theirs, own = (run.module.get_submodule(part).state_dict() for part in (average, network))
        original = battery.MomentumClassifier().get_submodule(network).state_dict()
        shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (theirs, own, original)]
        assert shapes[0] == shapes[1] != shapes[2]
        for key in own:
            kept = [plan_in_force(run.module).kept_along(f"{part}.{key}") for part in (average, network)]
            assert str(kept[0]) == str(kept[1])


@pytest.mark.parametrize(("name", "moments"), STOPS, scope="module")
def test_stopped_equals_unbroken(name: str, moments: str, run: Run, tmp_path: Path) -> None:
    paths = getattr(run, moments)
    assert len(paths) >= battery.EPOCHS
    for path in paths:
        resumed, _ = battery.train(
            tmp_path / path.stem, battery.make_callback(name), ckpt_path=path, module=battery.network_of(name)
        )
        assert battery.differences(run.module, resumed) == [], path.name


@SOME_ROWS
def test_a_callback_whose_run_broke_off_knows_nothing_of_it_in_the_next(name: str, tmp_path: Path) -> None:
    class BreakOff(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.current_epoch == 1 and trainer.global_step % battery.BATCHES == 2:
                raise ValueError("broken off")

    settings = {"start_epoch": 2, "steps": 1}  # after the run breaks off, all but ranks and searches
    callback, network = battery.make_callback(name, **settings), battery.network_of(name)
    with pytest.raises(ValueError, match="broken off"):
        battery.train(tmp_path / "other", callback, BreakOff(), module=network(16), max_epochs=4)
    used, _ = battery.train(tmp_path / "used", callback, module=network, max_epochs=4)
    unused, _ = battery.train(
        tmp_path / "unused", battery.make_callback(name, **settings), module=network, max_epochs=4
    )
    assert battery.differences(used, unused) == []


@SOME_ROWS
def test_one_step_after_a_prune_equals_the_sliced_step_of_the_masked_twin(name: str, tmp_path: Path) -> None:
    """Both twins take the same step in float64; what the prune left must be what the mask left."""
    found: dict[str, float] = {}
    # With compensation the weights are other ones; `test_compensation_in_training.py` has the like of it.
    network = battery.network_of(name)
    groups = lp.trace(network(), EXAMPLE).groups
    # What is normalised over channels has other statistics without them than with zeros in their place.
    others = [group.name.partition("#")[0] for group in groups.values() if not group.mask_exact]
    callback = battery.make_callback(name, steps=1, compensate="none", ignore=others)

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
            mask(lp.trace(twin, EXAMPLE.double(), blocks=name == "blocks"), plan)
            batch = [images.double() if images.is_floating_point() else images for images in next(iter(loader))]
            for model, stepper in ((twin, before.optimizer), (small, optimizer)):
                stepper.zero_grad()
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                stepper.step()
            index = plan.index()
            for key, value in twin.named_parameters():
                for axis, stays in index.get(key, {}).items():
                    value = value.index_select(axis, stays)
                apart = (value - small.get_parameter(key)).detach().abs()
                found[key] = max(apart.flatten().tolist(), default=0.0)  # what is left of a block has no numbers

    before, loader = Before(), battery.loaders()[0]
    battery.train(tmp_path, before, callback, After(), module=network, precision="64-true", max_epochs=2)
    assert len(found) == len(list(network().parameters()))
    # The bias before the normalisation has no gradient but rounding, at most some 1e-17, which Adam divides by 1e-8.
    limits = {"first.bias": 1e-10}
    assert {key: value for key, value in found.items() if value > limits.get(key, 1e-14)} == {}


@ROWS
def test_reloads_without_a_trainer(name: str, run: Run) -> None:
    assert run.trainer.checkpoint_callback.best_model_path == str(run.checkpoint)
    for source in (battery.network_of(name), battery.network_of(name)()):
        loaded = lp.load_pruned(source, run.checkpoint)
        assert battery.differences(run.module, loaded) == []
        images = battery.images(8).tensors[0]
        torch.testing.assert_close(loaded(images), run.module.eval()(images), rtol=0, atol=0)
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    assert checkpoint["lightning_prune"].keys() == {"plan", "aliases", "copies"}
    assert checkpoint["lightning_prune"]["copies"] == [
        ["Watch.weights", ""]
    ]  # in the shapes of a network that is pruned


@ROWS
def test_validates_tests_and_predicts_from_the_checkpoint(name: str, run: Run, tmp_path: Path) -> None:
    path, loader = run.checkpoint, battery.loaders()[1]
    reached = float(run.trainer.callback_metrics["val/accuracy"])
    fresh = L.Trainer(
        accelerator="cpu", callbacks=[battery.make_callback(name)], logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    (validated,) = fresh.validate(battery.network_of(name)(), loader, ckpt_path=path, verbose=False)
    (tested,) = fresh.test(battery.network_of(name)(), loader, ckpt_path=path, verbose=False)
    predicted = torch.cat(fresh.predict(battery.network_of(name)(), loader, ckpt_path=path))
    assert validated["val/accuracy"] == tested["val/accuracy"] == pytest.approx(reached)
    right = (predicted.argmax(1) == loader.dataset.tensors[1]).float().mean()
    assert float(right) == pytest.approx(reached)


@ROWS
def test_leaves_nothing_behind(name: str, run: Run) -> None:
    module, callback = run.module, run.callback
    hooks = [
        key
        for child in module.modules()
        for key, held in child.__dict__.items()
        if "hook" in key and held and key[0] == "_"
    ]
    assert hooks == []
    assert {as_written(type(child)) for child in module.modules()} == {
        type(child) for child in battery.network_of(name)().modules()
    }
    assert not any(key.startswith("on_") for key in module.__dict__)
    assert not any(isinstance(value, nn.Module) for value in callback.__dict__.values())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert battery.differences(module, twin) == []
    assert pickle.loads(pickle.dumps(callback)).state_dict().keys() == callback.state_dict().keys()


@NETWORKS
def test_exports(run: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module = copy.deepcopy(run.module).eval()
    images = battery.images(4).tensors[0]
    expected = module(images).detach()
    path = tmp_path / "pruned.onnx"
    torch.onnx.export(module, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(module, (images,))
    torch.testing.assert_close(exported.module()(images), expected)


@SOME_ROWS
def test_fits_again_the_same_module_or_another_one(name: str, run: Run, tmp_path: Path) -> None:
    callback = battery.make_callback(name)
    module, _ = battery.train(tmp_path / "first", callback, module=battery.network_of(name))
    assert battery.differences(run.module, module) == []
    before = plan_in_force(module)
    another, _ = battery.train(tmp_path / "another", callback, module=battery.network_of(name))
    assert battery.differences(run.module, another) == []
    battery.train(tmp_path / "again", callback, module=module)
    assert plan_in_force(module) == before
    assert flops(module) / flops(battery.network_of(name)()) <= 0.5


def _run_to_the_end(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    # Every 5 of 6 batches: Lightning itself, without any of our callbacks, does not resume to the same bits from a
    # checkpoint of a run that was resumed from one written right after the last batch of an epoch.
    saver = ModelCheckpoint(
        root / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=5, enable_version_counter=False
    )
    paths = sorted((root / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    module, _ = battery.train(
        root,
        battery.make_callback(name),
        saver,
        ckpt_path=paths[-1] if paths else None,
        module=battery.network_of(name),
        inference_mode=True,
    )
    torch.save(module.state_dict(), root / "end.partial")
    (root / "end.partial").rename(root / "end.pt")


def _kill_and_resume(name: str, unbroken: Run, root: Path, kills: int) -> None:
    """Kill runs at random moments after a new checkpoint has appeared, until that has been done often enough."""
    context, chance, killed, runs = warm(), random.Random(name), 0, 0
    expected = unbroken.module.state_dict()
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
        assert end.keys() == expected.keys()
        assert all(torch.equal(end[key], value) for key, value in expected.items()), f"run {runs}, {killed} kills"
        runs += 1


@SOME_ROWS
def test_killed_and_resumed_equals_unbroken(name: str, run: Run, tmp_path: Path) -> None:
    _kill_and_resume(name, run, tmp_path, kills=2)


@pytest.mark.long
@ROWS
def test_killed_twenty_times_and_resumed_equals_unbroken(name: str, run: Run, tmp_path: Path) -> None:
    _kill_and_resume(name, run, tmp_path, kills=20)
