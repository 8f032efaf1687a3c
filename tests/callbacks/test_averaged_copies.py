"""Averaged copies of the weights lose the same channels and keep their history."""

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from shortened import ordinary
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.pruning_plan import plan_in_force

DECAY = 0.8
AVERAGES: dict[str, Any] = {
    "equal": WeightAveraging,
    "exponential": lambda: EMAWeightAveraging(decay=DECAY),
    "parameters alone, every other step": lambda: EMAWeightAveraging(
        decay=DECAY, use_buffers=False, update_every_n_steps=2
    ),
}


class Naive(L.Callback):
    """Average the weights in the shapes of the original model; what is removed stands still."""

    averages: ClassVar[dict[int, dict[str, Tensor]]] = {}  # not on the callback, where they would be pruned along

    @property
    def average(self) -> dict[str, Tensor]:
        return self.averages.setdefault(id(self), {})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        plan = plan_in_force(pl_module)
        index = plan.index() if plan is not None else {}
        for name, value in pl_module.state_dict().items():
            if not value.is_floating_point():
                continue
            average = self.average.setdefault(name, value.clone())
            axes = index.get(name, {})
            stays = torch.meshgrid(
                *(axes.get(axis, torch.arange(size)) for axis, size in enumerate(average.shape)), indexing="ij"
            )
            average[stays] = average[stays] * DECAY + value * (1 - DECAY)
        self.index = index


@pytest.mark.parametrize("first", ["averaging", "pruning"])
@pytest.mark.parametrize("name", ["magnitude", "taylor", "vit"])
def test_the_history_is_kept_through_prunes(name: str, first: str, tmp_path: Path) -> None:
    naive, pair = Naive(), [AVERAGES["exponential"](), battery.make_callback(name, compensate="none")]
    callbacks = naive, *(pair if first == "averaging" else pair[::-1])
    module, trainer = battery.train(tmp_path, *callbacks, module=battery.network_of(name))
    assert trainer.callback_metrics["prune/keep_flops"] <= 0.5
    for key, expected in naive.average.items():  # Lightning leaves its average in the module
        for axis, stays in naive.index.get(key, {}).items():
            expected = expected.index_select(axis, stays)
        torch.testing.assert_close(module.state_dict()[key], expected, msg=key)
    loaded = lp.load_pruned(battery.network_of(name), trainer.checkpoint_callback.best_model_path)
    assert battery.differences(module, loaded) == []  # Lightning saves the average for use


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("exponential", "taylor", marks=pytest.mark.long),
        ("exponential", "magnitude_refit"),
        pytest.param("exponential", "vit", marks=pytest.mark.long),
        pytest.param("equal", "taylor", marks=pytest.mark.long),
        pytest.param("parameters alone, every other step", "taylor", marks=pytest.mark.long),
    ],
)
def test_resumes_to_the_same_bits(kind: str, name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    network = battery.network_of(name)
    unbroken, _ = battery.train(tmp_path, battery.make_callback(name), AVERAGES[kind](), saver, module=network)
    paths = sorted((tmp_path / "checkpoints").glob("step=*.ckpt"))
    assert len(paths) == battery.EPOCHS * battery.BATCHES // 4
    for path in paths:
        callbacks = [AVERAGES[kind](), battery.make_callback(name)]
        resumed, _ = battery.train(tmp_path / path.stem, *callbacks, ckpt_path=path, module=network)
        assert battery.differences(unbroken, resumed) == [], path.name


class Holding(battery.ResidualClassifier):
    """Averages a part by its own means; the copy is a part of it, or put away where torch does not look."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        self.other = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        average = AveragedModel(self.body, avg_fn=get_ema_avg_fn(0.9))
        self.averages: Any = [average] if hidden else average

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images.flatten(1)) + self.other(images.flatten(1))

    def on_train_batch_end(self, *_: Any) -> None:
        average = self.averages[0] if isinstance(self.averages, list) else self.averages
        average.update_parameters(self.body)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD([*self.body.parameters(), *self.other.parameters()], 0.1)


def shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


@pytest.mark.parametrize("hidden", [False, True])
def test_an_averaged_model_of_what_is_pruned_is_pruned_along(hidden: bool, tmp_path: Path) -> None:
    module, _ = battery.train(tmp_path, PruningCallback(round_to=2), module=Holding(hidden), max_epochs=2)
    average = module.averages[0] if hidden else module.averages
    assert shapes(average.module) == shapes(module.body) != shapes(Holding(hidden).body)
    assert average.module[0].out_features == len(average.module[0].bias)


class Silent(Holding):
    """An average that is not brought up to date in the first steps, so that nothing shows what it follows."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


def test_an_averaged_model_that_does_not_show_what_it_follows_is_refused(tmp_path: Path) -> None:
    said = (
        "'averages' of Silent averages the weights of 'body' in the shapes they have now, which does not follow when "
        "channels are pruned; use Lightning's WeightAveraging or EMAWeightAveraging callback, which does."
    )
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        battery.train(tmp_path, PruningCallback(round_to=2), module=Silent(hidden=True))


@pytest.mark.parametrize("hidden", [False, True])
def test_an_averaged_model_of_another_part_does_not_matter(hidden: bool, tmp_path: Path) -> None:
    callback = PruningCallback(round_to=2, module="other", example_inputs=[1, 64])
    module, _ = battery.train(tmp_path, callback, module=Holding(hidden))
    assert module.other[0].out_features <= 8
    assert module.body[0].out_features == 32


class ByHand(L.Callback):
    """The average that many projects write for themselves."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = AveragedModel(pl_module.body, avg_fn=get_ema_avg_fn(0.9))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.average.update_parameters(pl_module.body)


def without_average() -> Holding:
    module = Holding(hidden=True)
    module.averages, module.on_train_batch_end = None, lambda *_: None
    return module


class OfNames(ByHand):
    """The same in a dictionary, whose entries are made anew."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = {"of": {name: value.clone() for name, value in pl_module.state_dict().items()}}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        of = self.kept["of"]
        for name, value in pl_module.state_dict().items():
            of[name] = 0.9 * of[name] + 0.1 * value


class InOrder(ByHand):
    """The same in a list, in the order of the parameters."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shadow = [value.detach().clone() for value in pl_module.parameters()]

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for value, shadow in zip(pl_module.parameters(), self.shadow, strict=True):
            shadow.sub_(0.1 * (shadow - value.detach()))

    on_train_batch_end = L.Callback.on_train_batch_end


class Wrapped(ByHand):
    """The same in a wrapper, made late."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ema = nn.ModuleDict({"module": copy.deepcopy(pl_module.body)})

    on_fit_start = L.Callback.on_fit_start

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema["module"].parameters()), list(pl_module.body.parameters()), 0.1)


class BeforeSteps(ByHand):
    """The same, before the weights change."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.average.update_parameters(pl_module.body)

    on_train_batch_end = L.Callback.on_train_batch_end


class Late(ByHand):
    """The same, which waits for the network to settle down, and takes every other step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > 14 and trainer.global_step % 2 == 0:
            super().on_train_batch_end(trainer, pl_module, *args)


@pytest.mark.parametrize("kind", [ByHand, OfNames, InOrder, Wrapped, Late, BeforeSteps])
def test_an_average_that_a_callback_keeps_is_pruned_along(kind: Any, tmp_path: Path) -> None:
    kept = kind()
    module, _ = battery.train(tmp_path, PruningCallback(round_to=2), kept, module=without_average(), max_epochs=3)
    assert shapes(module.body) != shapes(without_average().body)
    if kind is OfNames:
        assert {name: value.shape for name, value in kept.kept["of"].items()} == {
            name: value.shape for name, value in module.state_dict().items()
        }
    elif kind is InOrder:
        assert [value.shape for value in kept.shadow] == shapes(module)
    else:
        model = kept.ema["module"] if kind is Wrapped else kept.average.module
        assert shapes(model) == shapes(module.body)
        assert model[0].out_features == len(model[0].bias)


class Following(Holding):
    """Has the copy of its weights as a frozen part, which follows them by momentum."""

    def __init__(self) -> None:
        super().__init__(hidden=True)
        self.averages = [None]
        self.momentum = copy.deepcopy(self.body).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for followed, own in zip(self.body.parameters(), self.momentum.parameters(), strict=True):
            own.data = own.data * 0.5 + followed.data * 0.5
        wanted = self.momentum(batch[0].flatten(1))
        return (self.body(batch[0].flatten(1)) - wanted).pow(2).mean() + super().training_step(batch, batch_idx)

    on_train_batch_end = L.LightningModule.on_train_batch_end


def copies_of(kept: Any, module: Any) -> dict[str, Tensor]:
    """Return the tensors of a copy by the names of those of `Holding.body`."""
    names = list(module.body.state_dict())
    if isinstance(kept, OfNames):
        return {name: kept.kept["of"][f"body.{name}"] for name in names}
    if isinstance(kept, InOrder):
        of_module = dict(zip(dict(module.named_parameters()), kept.shadow, strict=True))
        return {name: of_module[f"body.{name}"] for name in names}
    if isinstance(kept, Wrapped):
        return kept.ema["module"].state_dict()
    inside = module.momentum if hasattr(module, "momentum") else module.averages.module
    return inside.state_dict()


@pytest.mark.parametrize("kind", [OfNames, InOrder, Wrapped, Following, Holding])
def test_a_copy_that_has_the_weights_makes_up_for_a_prune_as_they_do(kind: Any, tmp_path: Path) -> None:
    elsewhere = issubclass(kind, L.Callback)
    module: Any = without_average() if elsewhere else Following() if kind is Following else Holding(hidden=False)
    kept = [kind()] if elsewhere else []
    module.configure_optimizers = lambda: optim.SGD([*module.body.parameters(), *module.other.parameters()], 0.0)
    callback = PruningCallback(round_to=2, compensate="refit")
    start = copy.deepcopy(module.body.state_dict())
    battery.train(tmp_path, callback, *kept, module=module, max_epochs=2)
    (prune,) = callback.history.prunes
    assert prune.compensation.method == "refit"
    assert module.body[2].weight.shape != start["2.weight"].shape
    columns = plan_in_force(module).kept_along("body.2.weight")[1]
    assert not torch.allclose(module.body[2].weight, start["2.weight"][:, columns], atol=1e-3)  # made up for
    copied = copies_of(kept[0] if kept else None, module)
    for name, tensor in module.body.state_dict().items():
        assert torch.allclose(copied[name], tensor, atol=1e-5), name


class FollowingLate(Following):
    """The same from the second epoch on; until then its copy could be a teacher."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch >= 1:
            return super().training_step(batch, batch_idx)
        return battery.ResidualClassifier.training_step(self, batch, batch_idx)


def test_a_momentum_encoder_that_follows_later_on_is_pruned_along(tmp_path: Path) -> None:
    module: Any = FollowingLate()
    battery.train(tmp_path, PruningCallback(round_to=2), module=module, max_epochs=3)
    assert shapes(module.momentum) == shapes(module.body) != shapes(Following().body)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Following, FollowingLate])
def test_a_momentum_encoder_resumes_to_the_same_bits(kind: Any, tmp_path: Path) -> None:
    def run(root: Path, **settings: Any) -> Any:
        callback = PruningCallback(round_to=2, steps=2, compensate_batches=2)
        return battery.train(root, callback, module=kind(), max_epochs=4, **settings)[0]

    unbroken = run(tmp_path)
    paths = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths[:-1]:
        assert battery.differences(unbroken, run(tmp_path / path.stem, ckpt_path=path)) == [], path.name


class Restored(L.Callback):
    """An average that is made before a checkpoint is loaded, and takes its weights from that."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = AveragedModel(pl_module.body, avg_fn=get_ema_avg_fn(0.9))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.average.update_parameters(pl_module.body)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average.load_state_dict(state_dict)


class RestoredByName(Restored):
    """The same in a dictionary, into whose entries the numbers are copied."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.average = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, value in pl_module.named_parameters():
            self.average[name].lerp_(value.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return self.average

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            self.average[name].copy_(value)


class RestoredByHook(Holding):
    """Has an average out of sight, which its own hooks save and load."""

    def __init__(self) -> None:
        super().__init__(hidden=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.averages[0].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.averages[0].load_state_dict(checkpoint["average"])


def average_of(module: Any, *callbacks: Any) -> dict[str, Tensor]:
    average = callbacks[0].average if callbacks else module.averages[0]
    return average if isinstance(average, dict) else average.state_dict()


@pytest.mark.parametrize("kind", ordinary([Restored, RestoredByName, RestoredByHook], Restored, RestoredByHook))
def test_an_average_that_is_restored_by_whose_it_is_resumes_to_the_same_bits(kind: Any, tmp_path: Path) -> None:
    def run(root: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
        callback = PruningCallback(round_to=2, compensate_batches=2)
        kept = [kind()] if issubclass(kind, L.Callback) else []
        module = without_average if kept else kind
        torch.manual_seed(0)
        trained, _ = battery.train(root, callback, *kept, module=module(), max_epochs=3, **settings)
        return trained, average_of(trained, *kept)

    unbroken, average = run(tmp_path)
    path = sorted((tmp_path / "checkpoints").glob("*.ckpt"))[1]  # after the prune
    resumed, again = run(tmp_path / "on", ckpt_path=path)
    assert battery.differences(unbroken, resumed) == []
    assert average.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in average.items())


def test_an_average_out_of_sight_is_loaded_in_the_shapes_that_it_was_saved_in(tmp_path: Path) -> None:
    module, trainer = battery.train(tmp_path, PruningCallback(round_to=2), module=RestoredByHook(), max_epochs=2)
    path = trainer.checkpoint_callback.best_model_path
    fresh, tested = RestoredByHook(), L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    tested.validate(fresh, battery.loaders()[1], ckpt_path=path, verbose=False)
    for loaded in (lp.load_pruned(RestoredByHook, path), RestoredByHook.load_from_checkpoint(path), fresh):
        average = average_of(loaded)
        assert all(torch.equal(value, average[name]) for name, value in average_of(module).items())
    with pytest.raises(ValueError, match="another architecture"):
        lp.load_pruned(nn.Linear(2, 2), path)


class Taught(ByHand):
    """A teacher that starts as what is trained, and does not change."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.teacher = copy.deepcopy(pl_module.body).requires_grad_(False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.teacher(args[1][0].flatten(1))


def test_a_teacher_that_a_callback_keeps_is_not_pruned(tmp_path: Path) -> None:
    taught = Taught()
    battery.train(tmp_path, PruningCallback(round_to=2), taught, module=without_average(), max_epochs=2)
    assert shapes(taught.teacher) == shapes(without_average().body)


def test_an_averaged_model_of_another_part_that_a_callback_holds_does_not_matter(tmp_path: Path) -> None:
    callback = PruningCallback(round_to=2, module="other", example_inputs=[1, 64])
    module, _ = battery.train(tmp_path, callback, ByHand(), module=without_average())
    assert module.other[0].out_features <= 8
