"""What else people ask of a Trainer, with a pruning callback in it."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from shortened import ordinary
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks.trainer_state import unlogged
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import plan_in_force

# What only reads the weights at a prune, and what follows every step; where gradients matter, what changes them too.
CALLBACKS = pytest.mark.parametrize("name", ordinary(["magnitude", "taylor"], "taylor"))
pytestmark = pytest.mark.filterwarnings("ignore:Prune . of .")  # removes nothing, in steps of two channels
GRADIENTS = pytest.mark.parametrize("name", ordinary(["magnitude", "taylor", "rl_joint"], "taylor"))


class Optimized(battery.ResidualClassifier):
    """The network of the battery with other optimizers."""

    make: Callable[[Any], Any]

    def configure_optimizers(self) -> Any:
        return self.make(self)


def optimized(make: Callable[[Any], Any]) -> Optimized:
    module = Optimized()
    module.make = make
    return module


class Watch(L.Callback):
    """Note the param groups at the start, and the weights after the last prune."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.groups = groups(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.current_epoch == battery.EPOCHS - 1 and not hasattr(self, "weights"):
            self.weights = {name: value.detach().clone() for name, value in pl_module.named_parameters()}


def groups(trainer: L.Trainer) -> list[list[list[int]]]:
    return [[[id(p) for p in group["params"]] for group in one.param_groups] for one in trainer.optimizers]


def standing(module: nn.Module, watch: Watch) -> list[str]:
    """Name the parameters that the last epoch has not changed."""
    return [name for name, value in module.named_parameters() if torch.equal(value, watch.weights[name])]


def is_pruned(module: nn.Module) -> bool:
    """Tell whether the plan in force and the tensors say the same, and less than all stays."""
    plan = plan_in_force(module)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return plan is not None and all(shapes[name] == shape for name, shape in plan.pruned_shapes().items())


# -- optimizers and schedules ------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9),
    "SGD-foreach": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True),
    "SGD-fused": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam-foreach": partial(optim.Adam, lr=0.01, amsgrad=True, foreach=True),
    "Adam-fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "AdamW-fused": partial(optim.AdamW, lr=0.01, fused=True),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "RMSprop-foreach": partial(optim.RMSprop, lr=0.01, foreach=True),
    "Adagrad": partial(optim.Adagrad, lr=0.05),
    "Adagrad-fused": partial(optim.Adagrad, lr=0.05, fused=True),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "Adafactor": partial(optim.Adafactor, lr=0.05),
}


@pytest.mark.parametrize("kind", ordinary(OPTIMIZERS, "SGD", "Adam-fused", "RMSprop", "Adadelta", "Adafactor"))
def test_optimizers_keep_their_groups_and_a_state_of_the_right_shape(kind: str, tmp_path: Path) -> None:
    watch = Watch()
    module, trainer = battery.train(
        tmp_path,
        battery.make_callback("magnitude"),
        watch,
        module=optimized(lambda m: OPTIMIZERS[kind](m.parameters())),
    )
    assert is_pruned(module)
    assert groups(trainer) == watch.groups == [[[id(p) for p in module.parameters()]]]
    # The bias of a convolution before batch normalisation has no effect, and so no gradient but what rounding leaves.
    assert set(standing(module, watch)) <= {"first.bias"}
    state = trainer.optimizers[0].state
    assert len(state) == len(list(module.parameters()))
    for parameter, values in state.items():
        for value in values.values():
            if isinstance(value, Tensor) and value.dim():
                assert all(own in (1, size) for own, size in zip(value.shape, parameter.shape, strict=False))
    restored = OPTIMIZERS[kind](lp.load_pruned(battery.ResidualClassifier, last_path(trainer)).parameters())
    restored.load_state_dict(torch.load(last_path(trainer), weights_only=True)["optimizer_states"][0])


def last_path(trainer: L.Trainer) -> str:
    return trainer.checkpoint_callback.best_model_path


def _frozen_stem(module: nn.Module) -> optim.Optimizer:
    module.stem.requires_grad_(False)
    rest = [p for name, p in module.named_parameters() if not name.startswith(("stem", "head"))]
    listed = [{"params": list(module.stem.parameters()), "lr": 0.5}, {"params": rest, "weight_decay": 1e-3}]
    return optim.SGD([*listed, {"params": list(module.head.parameters()), "momentum": 0.5}], 0.05, momentum=0.9)


@CALLBACKS
def test_frozen_groups_stay_frozen_and_every_group_keeps_its_settings(name: str, tmp_path: Path) -> None:
    watch, module = Watch(), optimized(_frozen_stem)
    stem = module.stem.weight.detach().clone()
    module, trainer = battery.train(tmp_path, battery.make_callback(name, keep=0.3), watch, module=module)
    assert groups(trainer) == watch.groups
    (optimizer,) = trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05, 0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-3, 0]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9, 0.5]
    assert set(standing(module, watch)) - {"first.bias"} == {"stem.weight", "stem.bias"}
    kept = list(plan_in_force(module).groups["stem"].kept)
    assert len(kept) < len(stem)
    torch.testing.assert_close(module.stem.weight, stem[kept], rtol=0, atol=0)  # frozen: only sliced
    assert not module.stem.weight.requires_grad


class SharpnessAware(optim.Optimizer):
    """Steps from where it is with the gradients of a worse place near by; the steps are those of another optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = optim.SGD(self.param_groups, 0.05, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        loss = torch.enable_grad()(closure)()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            self.state[parameter]["before"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05)
        torch.enable_grad()(closure)()
        for parameter in parameters:
            parameter.copy_(self.state[parameter]["before"])
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


@CALLBACKS
def test_an_optimizer_that_steps_with_another_one(name: str, tmp_path: Path) -> None:
    def fit(root: Path, path: Path | None = None) -> tuple[L.LightningModule, L.Trainer]:
        module = optimized(lambda m: SharpnessAware(m.parameters()))
        return battery.train(root, battery.make_callback(name), module=module, ckpt_path=path)

    module, trainer = fit(tmp_path)
    assert is_pruned(module)
    for one in (trainer.optimizers[0], trainer.optimizers[0].base_optimizer):
        assert len(one.state) == len(list(module.parameters()))
        assert all(value.shape == p.shape for p, values in one.state.items() for value in values.values())
    path = sorted(Path(last_path(trainer)).parent.glob("*.ckpt"))[1]
    resumed, _ = fit(tmp_path / "resumed", path)
    assert is_pruned(resumed)  # what the inner optimizer knew is in no checkpoint, so not to the same bits


class ByHand(battery.ResidualClassifier):
    """Three optimizers that step in turn, each with a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.clip_gradients(optimizers[0], 1.0, "norm")
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        made = [
            optim.SGD([*self.stem.parameters(), *self.first.parameters()], 0.05, momentum=0.9),
            optim.AdamW([*self.norm.parameters(), *self.second.parameters()], 0.01),
            optim.RMSprop(self.head.parameters(), 0.01),
        ]
        return made, [optim.lr_scheduler.ExponentialLR(one, 0.97) for one in made]


@CALLBACKS
def test_several_optimizers_by_hand(name: str, tmp_path: Path) -> None:
    watch = Watch()
    module, trainer = battery.train(tmp_path, battery.make_callback(name), watch, module=ByHand())
    assert is_pruned(module)
    assert groups(trainer) == watch.groups
    assert set(standing(module, watch)) <= {"first.bias"}
    steps = battery.EPOCHS * battery.BATCHES
    assert trainer.optimizers[2].param_groups[0]["lr"] == pytest.approx(0.01 * 0.97**steps)
    paths = sorted(Path(last_path(trainer)).parent.glob("*.ckpt"))
    for path in paths[:3]:
        resumed, _ = battery.train(tmp_path / path.stem, battery.make_callback(name), ckpt_path=path, module=ByHand())
        assert battery.differences(module, resumed) == [], path.name


def _scheduled(make: Callable[[optim.Optimizer], Any], **settings: Any) -> Callable[[nn.Module], Any]:
    def configure(module: nn.Module) -> Any:
        optimizer = optim.SGD(module.parameters(), 0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **settings}}

    return configure


SCHEDULES = {
    "one cycle": _scheduled(lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30), interval="step"),
    "cosine": _scheduled(lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 5), interval="epoch"),
    "every third step": _scheduled(lambda o: optim.lr_scheduler.StepLR(o, 2), interval="step", frequency=3),
    "averaged": _scheduled(lambda o: optim.swa_utils.SWALR(o, 0.01, 3), interval="epoch"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_go_on_as_if_nothing_was_pruned(schedule: str, tmp_path: Path) -> None:
    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            group = trainer.optimizers[0].param_groups[0]
            self.seen.append((group["lr"], group["momentum"]))

    plain, pruned = Rates(), Rates()
    battery.train(tmp_path / "plain", plain, module=optimized(SCHEDULES[schedule]))
    battery.train(
        tmp_path / "pruned", pruned, battery.make_callback("magnitude"), module=optimized(SCHEDULES[schedule])
    )
    assert pruned.seen == plain.seen
    assert len(set(plain.seen)) > 1


@pytest.mark.filterwarnings("ignore:Training has ended with")
def test_a_plateau_schedule_and_stopping_early_see_their_metric(tmp_path: Path) -> None:
    plateau = partial(optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)
    module = optimized(_scheduled(plateau, monitor="train/loss"))
    stop = EarlyStopping("val/accuracy", patience=1, min_delta=2.0, mode="max")
    module, trainer = battery.train(tmp_path, battery.make_callback("taylor"), stop, module=module, max_epochs=7)
    assert trainer.current_epoch == 5  # the last prune is before epoch 3, whose score is the first that counts
    assert is_pruned(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1


@GRADIENTS
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_accumulation_and_clipping(algorithm: str, name: str, tmp_path: Path) -> None:
    """Six batches in steps of four: each epoch ends with a step of two, right before a prune."""
    largest: list[float] = []

    class Clipped(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if args[-1] in (3, 5):  # after a step the gradients are still there
                flat = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
                largest.append(float(flat.norm() if algorithm == "norm" else flat.abs().max()))

    settings = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    module, trainer = battery.train(tmp_path, battery.make_callback(name), Clipped(), **settings)
    assert is_pruned(module)
    assert trainer.global_step == len(largest) == 2 * battery.EPOCHS
    assert max(largest) <= 0.1001
    path = sorted(Path(last_path(trainer)).parent.glob("*.ckpt"))[1]
    resumed, _ = battery.train(tmp_path / "resumed", battery.make_callback(name), ckpt_path=path, **settings)
    assert battery.differences(module, resumed) == []


@GRADIENTS
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)],
)
def test_precisions(precision: str, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    def fresh() -> L.LightningModule:
        # Lightning loads weights before it converts the module, and so rounds float64 unless the module has it already.
        return battery.ResidualClassifier().to(dtype)

    watch = Watch()
    module, trainer = battery.train(tmp_path, battery.make_callback(name), watch, module=fresh(), precision=precision)
    assert is_pruned(module)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert groups(trainer) == watch.groups
    moved = set(watch.weights) - set(standing(module, watch))
    assert moved >= {"stem.weight", "first.weight", "second.weight", "head.weight"}
    assert trainer.callback_metrics["val/accuracy"] > 0.5
    path = sorted(Path(last_path(trainer)).parent.glob("*.ckpt"))[1]
    resumed, _ = battery.train(
        tmp_path / "b", battery.make_callback(name), ckpt_path=path, module=fresh(), precision=precision
    )
    assert battery.differences(module, resumed) == []
    loaded = lp.load_pruned(fresh(), last_path(trainer))
    assert battery.differences(module, loaded) == []


# -- checkpoints -------------------------------------------------------------------------------------------------------

SAVERS: dict[str, dict[str, Any]] = {
    "last": {"save_last": True, "save_top_k": 0},
    "last as a link": {"save_last": "link"},
    "top two": {"save_top_k": 2, "monitor": "val/accuracy", "mode": "max"},
    "steps": {"every_n_train_steps": 7, "save_top_k": -1},
    "weights only": {"save_weights_only": True, "save_top_k": -1},
    "weights only, steps": {"save_weights_only": True, "every_n_train_steps": 5, "save_top_k": -1},
}


@CALLBACKS
@pytest.mark.parametrize("saver", SAVERS)
def test_whatever_is_saved_loads_with_its_plan(saver: str, name: str, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path / "saved", filename="{step}", **SAVERS[saver])
    seen: dict[int, nn.Module] = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            seen[trainer.global_step] = copy.deepcopy(pl_module)

    battery.train(tmp_path, battery.make_callback(name), Keep(), callback)
    paths = list((tmp_path / "saved").glob("*.ckpt"))
    assert paths
    for path in paths:
        content = torch.load(path, weights_only=True)
        assert ("optimizer_states" in content) != ("weights only" in saver)
        expected = seen[content["global_step"]]
        assert battery.differences(expected, lp.load_pruned(battery.ResidualClassifier, path)) == [], path.name
        assert ("lightning_prune" in content) == is_pruned(expected)


@CALLBACKS
@pytest.mark.parametrize("which", ["last", "best", "hpc"])
def test_resumes_from_what_the_trainer_finds_itself(which: str, name: str, tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=1, monitor="train/loss")

    unbroken, _ = battery.train(tmp_path / "unbroken", battery.make_callback(name))

    class Requeue(L.Callback):
        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            if which == "hpc":  # where SLURM's requeueing saves
                trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")

    _, first = battery.train(tmp_path, battery.make_callback(name), saver(), Requeue(), max_epochs=4)
    fresh = saver()
    if which == "best":  # known to the callback that saved it
        fresh.best_model_path = first.checkpoint_callback.best_model_path
    resumed, trainer = battery.train(tmp_path, battery.make_callback(name), fresh, ckpt_path=which)
    assert battery.differences(unbroken, resumed) == []
    assert trainer.current_epoch == battery.EPOCHS


@CALLBACKS
def test_saved_by_hand_after_fit(name: str, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback(name))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert battery.differences(module, lp.load_pruned(battery.ResidualClassifier, tmp_path / "end.ckpt")) == []


class Break(L.Callback):
    """Fail once, in the middle of an epoch after two prunes."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 15:
            raise RuntimeError("no space left on device")


@CALLBACKS
@pytest.mark.parametrize("first", ["saver", "pruning"])
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "save_on_exception"])
def test_a_checkpoint_of_the_moment_of_failure_has_the_plan(kind: str, first: str, name: str, tmp_path: Path) -> None:
    saver = (
        OnExceptionCheckpoint(tmp_path / "saved")
        if kind == "OnExceptionCheckpoint"
        else ModelCheckpoint(tmp_path / "saved", save_on_exception=True, every_n_epochs=10)
    )
    callbacks = [saver, battery.make_callback(name)] if first == "saver" else [battery.make_callback(name), saver]
    L.seed_everything(0, verbose=False)  # the weights that the unbroken run starts from
    module = battery.ResidualClassifier()
    with pytest.raises(RuntimeError, match="no space left on device"):
        battery.train(tmp_path, *callbacks, Break(), module=module)
    assert is_pruned(module)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    assert battery.differences(module, lp.load_pruned(battery.ResidualClassifier, path)) == []
    unbroken, _ = battery.train(tmp_path / "unbroken", battery.make_callback(name))
    resumed, _ = battery.train(tmp_path / "resumed", battery.make_callback(name), ckpt_path=path)
    assert battery.differences(unbroken, resumed) == []


# -- finders, limits, several runs -------------------------------------------------------------------------------------


class Tunable(battery.ResidualClassifier):
    """With a rate and a batch size for the finders to set."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 3

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader:
        return battery.loaders(self.batch_size)[0]

    def val_dataloader(self) -> DataLoader:
        return battery.loaders()[1]


@CALLBACKS
def test_the_finders_run_before_anything_is_pruned(name: str, tmp_path: Path) -> None:
    module = Tunable()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[
            battery.make_callback(name), BatchSizeFinder(max_trials=2, steps_per_trial=2),
            LearningRateFinder(num_training_steps=20),
        ],
    )  # fmt: skip
    watch = Watch()
    trainer.callbacks.append(watch)
    trainer.fit(module)
    assert module.batch_size == 4  # two trials, from 2
    assert module.lr != 1e-2
    assert is_pruned(module)
    assert groups(trainer) == watch.groups
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    assert not any(key.startswith("on_") for key in module.__dict__)


LIMITS: dict[str, dict[str, Any]] = {
    "overfit": {"overfit_batches": 2},
    "few batches": {"limit_train_batches": 2, "limit_val_batches": 1},
    "fraction of batches": {"limit_train_batches": 0.5, "limit_val_batches": 0.0},
    "no validation": {"limit_val_batches": 0},
    "validation in between": {"val_check_interval": 2, "num_sanity_val_steps": 2},
    "steps": {"max_epochs": -1, "max_steps": 25},
    "profiler": {"profiler": "simple"},
    "anomalies": {"detect_anomaly": True},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
}


@CALLBACKS
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit: str, name: str, tmp_path: Path) -> None:
    watch = Watch()
    module, trainer = battery.train(tmp_path, battery.make_callback(name), watch, **LIMITS[limit])
    assert is_pruned(module)
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    assert set(standing(module, watch)) <= {"first.bias"}


@CALLBACKS
@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_prunes_to_the_budget_and_goes_on(batches: int, name: str, tmp_path: Path) -> None:
    """One epoch is run, whatever start_epoch says; its last batch, of several, comes after the prune."""
    widths: list[int] = []

    class Widths(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            widths.append(pl_module.first.out_channels)

        def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert pl_module.first.out_channels < 24

    callback = battery.make_callback(name, start_epoch=2)
    module, trainer = battery.train(tmp_path, Widths(), callback, fast_dev_run=batches)
    assert trainer.global_step == batches
    assert [width < 24 for width in widths] == ([False] if batches == 1 else [False, False, True])
    assert is_pruned(module)
    assert callback.steps_done == callback.steps
    cost = CostModel(lp.trace(module, torch.zeros(1, 1, 8, 8)), "flops")
    assert 0.4 < cost(plan_in_force(module).widths) / cost.original <= 0.5


@CALLBACKS
def test_fit_validate_fit_deeper_with_fresh_trainers(name: str, tmp_path: Path) -> None:
    module, first = battery.train(tmp_path / "first", battery.make_callback(name))
    before, accuracy = plan_in_force(module), float(first.callback_metrics["val/accuracy"])
    (validated,) = first.validate(module, battery.loaders()[1], verbose=False)
    assert validated["val/accuracy"] == pytest.approx(accuracy)
    assert plan_in_force(module) == before
    assert not any(key.startswith("on_") for key in module.__dict__)
    watch = Watch()
    deeper = battery.make_callback(name, keep=0.3, steps=1)
    module, second = battery.train(tmp_path / "second", deeper, watch, module=module)
    assert second.callback_metrics["prune/keep_flops"] <= 0.3  # of the original, not of what was left
    assert groups(second) == watch.groups
    assert set(standing(module, watch)) <= {"first.bias"}
    assert all(set(group.kept) <= set(before.groups[key].kept) for key, group in plan_in_force(module).groups.items())
    loaded = lp.load_pruned(battery.ResidualClassifier, last_path(second))
    assert battery.differences(module, loaded) == []


@CALLBACKS
def test_the_same_trainer_fits_twice(name: str, tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, battery.make_callback(name), max_epochs=4)
    before = plan_in_force(module)
    trainer.fit_loop.max_epochs = battery.EPOCHS
    trainer.fit(module, *battery.loaders())
    assert trainer.current_epoch == battery.EPOCHS
    assert plan_in_force(module) == before


def test_rates_are_monitored(tmp_path: Path) -> None:
    _, trainer = battery.train(
        tmp_path, battery.make_callback("taylor"), LearningRateMonitor(), logger=CSVLogger(tmp_path, "csv")
    )
    trainer.logger.save()
    text = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "lr-Adam" in text
    assert "prune/keep_flops" in text


def test_a_callback_that_has_done_its_work_starts_anew_on_another_module(tmp_path: Path) -> None:
    """Pruned already or not; on its own it has nothing left to do."""
    callback = battery.make_callback("magnitude")
    module, _ = battery.train(tmp_path / "first", callback)
    wider, trainer = battery.train(tmp_path / "wider", battery.make_callback("magnitude", keep=0.9))
    other = lp.load_pruned(battery.ResidualClassifier, last_path(trainer)).train()
    for known, kept in ((module, 0.5), (other, 0.5), (battery.ResidualClassifier(), 0.5)):
        _, again = battery.train(tmp_path / "again", callback, module=known)
        assert again.callback_metrics["prune/keep_flops"] <= kept
    assert plan_in_force(wider).budget["achieved"] > 0.5


class Auxiliary(battery.ResidualClassifier):
    """Shows inner features to a head, in a hook that is not tried out on a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(24, 4)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.images = batch[0]
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *settings: Any, **more: Any) -> None:
        self.auxiliary(self.first(self.stem(self.images).relu()).mean((2, 3)))


def test_a_layer_beside_forward_that_reads_pruned_channels_is_spoken_of(tmp_path: Path) -> None:
    for trainer in ({}, {"fast_dev_run": 2}):
        with (
            pytest.warns(UserWarning, match=r"after channels of .*first.* were pruned.* put the layer .* into ignore"),
            pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        ):
            battery.train(tmp_path, battery.make_callback("magnitude"), module=Auxiliary(), **trainer)
    module, _ = battery.train(tmp_path, battery.make_callback("magnitude", ignore=["first"]), module=Auxiliary())
    assert is_pruned(module)


# -- copies and compiled modules ---------------------------------------------------------------------------------------


@CALLBACKS
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_in_the_middle_of_a_run_stand_alone(how: str, name: str, tmp_path: Path) -> None:
    def twin(value: Any) -> Any:
        return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))

    class Copy(L.Callback):
        def __init__(self) -> None:
            self.copies: list[nn.Module] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step % battery.BATCHES == 3:
                module, _ = twin(pl_module), twin(callback)
                assert battery.differences(pl_module, module) == []
                module(battery.images(3).tensors[0]).sum().backward()  # of another batch size than training
                self.copies.append(module)

    callback, copies = battery.make_callback(name), Copy()
    module, _ = battery.train(tmp_path / "copied", callback, copies)
    plain, _ = battery.train(tmp_path / "plain", battery.make_callback(name))
    assert battery.differences(module, plain) == []
    assert len(copies.copies) == battery.EPOCHS
    for early in copies.copies:
        whole = battery.ResidualClassifier()
        graph = lp.trace(early, torch.zeros(1, 1, 8, 8))
        lp.prune(early, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.2, round_to=1))
        assert early.first.out_channels < whole.first.out_channels


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("taylor", "module.compile()", marks=pytest.mark.long),
        pytest.param("magnitude", "torch.compile(module)", marks=pytest.mark.long),
    ],
)
def test_compiled_modules(name: str, how: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    module = battery.ResidualClassifier()
    if how == "module.compile()":
        module.compile(backend="eager")
        compiled = module
    else:
        compiled = torch.compile(module, backend="eager")
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=battery.EPOCHS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        callbacks=[battery.make_callback(name), watch, ModelCheckpoint(tmp_path)],
    )  # fmt: skip
    trainer.fit(compiled, *battery.loaders())
    assert is_pruned(module)
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    assert set(standing(module, watch)) <= {"first.bias"}
    assert groups(trainer) == watch.groups
    loaded = lp.load_pruned(battery.ResidualClassifier, last_path(trainer))
    assert battery.differences(module, loaded) == []
    images = battery.images(4).tensors[0]
    torch.testing.assert_close(compiled.eval()(images), loaded(images))


@pytest.mark.parametrize("name", ordinary(["magnitude", "sensitiveness"], "magnitude"))
def test_compiled_parts_stay_compiled_after_many_prunes(name: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    runs: list[int] = []  # of compiled code, by the number of its operations

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(len(graph.graph.nodes))
            return graph.forward(*args)

        return run

    in_first_steps: list[int] = []

    class Runs(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            runs.clear()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 0:
                in_first_steps.append(len(runs))

    module = battery.ResidualClassifier()
    module.compile(backend=backend)
    callback = battery.make_callback(name, steps=6, round_to=1)
    battery.train(tmp_path, callback, Runs(), module=module, max_epochs=9)
    assert callback.steps_done == 6
    assert len(in_first_steps) == 9
    assert min(in_first_steps) > 0


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.long), "ddp_fork", "ddp_notebook"])
def test_the_parent_of_spawned_ranks_holds_the_pruned_model(strategy: str, tmp_path: Path) -> None:
    callback = battery.make_callback("taylor")
    module, trainer = battery.train(tmp_path, callback, strategy=strategy, devices=2, accelerator="cpu")
    assert is_pruned(module)
    assert callback.result_path == last_path(trainer)
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    loaded = lp.load_pruned(battery.ResidualClassifier, last_path(trainer))
    assert battery.differences(module, loaded) == []
    assert module(battery.images(4).tensors[0]).shape == (4, 4)


def test_synchronized_normalization_loses_the_same_channels(tmp_path: Path) -> None:
    """What `sync_batchnorm=True` makes of the network before training, and takes back after; it runs on GPUs alone."""
    plain, sync = battery.ResidualClassifier(), TorchSyncBatchNorm()
    synchronized = sync.apply(copy.deepcopy(plain))
    for module in (plain, synchronized):
        graph = lp.trace(module, torch.zeros(1, 1, 8, 8))
        lp.prune(module, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=2))
    assert isinstance(synchronized.norm, nn.SyncBatchNorm)
    assert plan_in_force(synchronized) == plan_in_force(plain)
    reverted = sync.revert(synchronized)
    assert not isinstance(reverted.norm, nn.SyncBatchNorm)
    assert reverted.norm.num_features == plain.norm.num_features < 24
    assert battery.differences(plain, reverted) == []


# -- what the model logs itself ----------------------------------------------------------------------------------------


class LogsInForward(battery.ResidualClassifier):
    """Logs in its forward, a number and a tensor, and notes on whose behalf."""

    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()
        self.note = note

    def forward(self, images: Tensor) -> Tensor:
        self.log("images/size", float(len(images)))
        self.log_dict({"images/mean": images.mean()})
        return super().forward(images)

    def log(self, name: str, *arguments: Any, **settings: Any) -> None:
        if name.startswith("images/"):
            self.note(self._current_fx_name)
        super().log(name, *arguments, **settings)


@pytest.mark.parametrize("name", ["default", "sensitiveness", "rl_joint", "learn_to_prune"])
def test_what_a_model_logs_in_its_forward_is_of_training_alone(name: str, tmp_path: Path) -> None:
    hooks: set[str | None] = set()
    module, trainer = battery.train(tmp_path, battery.make_callback(name), module=LogsInForward(hooks.add))
    assert is_pruned(module)
    assert hooks == {"training_step", "validation_step"}
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    assert "log" not in vars(module)


def test_a_log_of_its_own_is_back_afterwards() -> None:
    inner, module = L.LightningModule(), L.LightningModule()
    module.part = inner
    own = module.log = lambda *_: pytest.fail("logged")
    with unlogged(module):
        with unlogged(module):
            module.log("a", 1.0)
        module.log("a", 1.0)
        inner.log("a", 1.0)
    assert module.log is own
    assert "log" not in vars(inner)


def test_a_second_shorter_fit_with_a_callback_that_is_done(tmp_path: Path) -> None:
    callback = battery.make_callback("magnitude")
    module, _ = battery.train(tmp_path, callback)
    before = plan_in_force(module)
    battery.train(tmp_path, callback, module=module, max_epochs=1)
    assert plan_in_force(module) == before
    with pytest.raises(ValueError, match="but the run ends after 1 epochs"):  # of a module that is yet to be pruned
        battery.train(tmp_path, callback, max_epochs=1)
