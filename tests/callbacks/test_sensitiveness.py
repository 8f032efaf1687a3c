"""Sensitiveness against pruning copies, worked out by hand, and inside training."""

import copy
import json
from pathlib import Path
from typing import Any

import battery
import jsonargparse
import lightning as L
import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import SensitivenessCallback
from lightning_prune.criteria import layer_scores, sensitiveness
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

SETTINGS: dict[str, Any] = {"levels": [0.25, 0.75], "draws": 3, "round_to": 1}


def diagonal(*strengths: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a network that is right on each class as long as its channel is there, and one example of each class."""
    n = len(strengths)
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, n, bias=False))
    model[0].weight.data.copy_(torch.diag(torch.tensor(strengths)))
    nn.init.eye_(model[2].weight)
    return model, (torch.eye(n), torch.arange(n))


def test_by_hand() -> None:
    # The weakest channels leave: one, then two, then three of four. The class that stays silent counts as class 0.
    model, batch = diagonal(4.0, 3.0, 2.0, 1.0)
    graph = lp.trace(model, batch[0])
    for levels, expected in (([0.25], 0.25), ([0.5], 0.5), ([0.99], 0.75), ([0.25, 0.5], 0.375), ([0.01], 0.25)):
        assert sensitiveness(graph, [batch], "magnitude", levels)["0"] == pytest.approx(expected)
    for strength, expected in ((1e-6, 0.0), (1e6, 0.75)):  # noise that swamps the weights leaves chance
        measured = sensitiveness(graph, [batch], "noise", [strength], draws=50)["0"]
        assert measured == pytest.approx(expected, abs=0.25)
        assert (measured == 0) == (expected == 0)


def test_random_damage_is_the_mean_over_draws_that_the_seed_decides() -> None:
    model, batch = diagonal(*[1.0] * 8)
    graph = lp.trace(model, batch[0])
    state = torch.get_rng_state()
    one, same, other = (sensitiveness(graph, [batch], levels=[0.5], draws=4, seed=seed)["0"] for seed in (0, 0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same
    # Four of eight leave, and with them four classes, or three if class 0, which silence counts as, is among them.
    assert {one, other} <= {0.5, 0.46875, 0.4375, 0.40625, 0.375}
    many = sensitiveness(graph, [batch], levels=[0.5], draws=200)["0"]
    assert many == pytest.approx(0.4375, abs=0.02)


@torch.no_grad()
def test_against_pruning_copies() -> None:
    torch.manual_seed(3)
    model = randomised(battery.ResidualClassifier(width=4)).double()
    graph = lp.trace(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    images, labels = torch.randn(60, 1, 8, 8, dtype=torch.float64), torch.randint(4, (60,))
    batches = list(zip(images.split(25), labels.split(25), strict=True))

    def accuracy(kept: dict[str, Tensor]) -> float:
        copied = copy.deepcopy(model).eval()
        lp.prune(copied, graph.plan(kept))
        return float((copied(images).argmax(1) == labels).double().mean())

    measured, before = sensitiveness(graph, batches, "magnitude", [0.25, 0.75]), accuracy({})
    norms = lp.criteria.magnitude(graph)
    for name, group in graph.groups.items():
        order = norms[name].argsort()
        lost = [max(0.0, 1 - accuracy({name: order[group.size * part // 4 :]}) / before) for part in (1, 3)]
        assert measured[name] == pytest.approx(sum(lost) / 2)
    assert len(set(measured.values())) > 1


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"damage": "fire"}, "damage must be one of random, magnitude, noise; got 'fire'"),
        ({"levels": []}, "levels of damage 'random' must be numbers above 0 and below 1.0"),
        ({"levels": [0.5, 1.0]}, "levels of damage 'random' must be numbers above 0 and below 1.0"),
        ({"damage": "noise", "levels": [0.0]}, "levels of damage 'noise' must be numbers above 0 and below inf"),
        ({"draws": 0}, "draws must be an integer of at least 1"),
        ({"ratio": "square"}, "ratio must be one of inverse, complement"),
        ({"limit_batches": 0}, "limit_batches must be a whole number of at least 1, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            SensitivenessCallback(**settings)
    model, (x, y) = diagonal(1.0, 1.0)
    with pytest.raises(ValueError, match=r"The accuracy is 0.0 before any damage.*train the model first"):
        sensitiveness(lp.trace(model, x), [(x, 1 - y)])


@pytest.mark.parametrize("ratio", ["inverse", "complement"])
def test_what_bears_damage_is_more_dispensable(ratio: str) -> None:
    importance = layer_scores({"a": 0.4, "b": 0.0, "c": 0.1}, ratio)
    assert importance["a"] > importance["c"] > importance["b"] > 0
    assert layer_scores({"a": 0.0, "b": 0.0}, ratio) == {"a": 1.0, "b": 1.0}


# -- the callback ------------------------------------------------------------------------------------------------------


class Deaf(battery.ResidualClassifier):
    """Nothing depends on the channels of `first`."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        nn.init.zeros_(self.second.weight)
        self.second.requires_grad_(False)


def test_the_layer_that_nothing_depends_on_loses_most(tmp_path: Path) -> None:
    callback = SensitivenessCallback(keep=0.8, **SETTINGS)
    module, _ = battery.train(tmp_path, callback, module=Deaf(), max_epochs=2)
    assert callback.state.sensitiveness["first"] == 0 < callback.state.sensitiveness["stem"]
    widths, groups = plan_in_force(module).widths, {"first": 24, "stem": 12}
    lost = {name: 1 - widths[name] / size for name, size in groups.items()}
    assert lost["first"] > 10 * lost["stem"]


def shuffled(root: Path, callback: L.Callback) -> L.LightningModule:
    L.seed_everything(0, verbose=False)
    module = battery.ResidualClassifier()
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=root, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(battery.images(96), 16, shuffle=True, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, loader, DataLoader(battery.images(64), 32, generator=torch.Generator().manual_seed(2)))
    return module


@pytest.mark.filterwarnings("ignore:Training has ended with")
def test_measuring_leaves_training_alone(tmp_path: Path) -> None:
    class Measures(SensitivenessCallback):
        def allocate(self, graph: ChannelGraph, scores: object, keep: float) -> PruningPlan:
            self.measured = dict(self.state.sensitiveness)
            return graph.plan({})

    callback = Measures(keep=0.5, **SETTINGS)
    with pytest.warns(UserWarning, match="Prune 1 of 1 has pruned nothing"):
        measured = shuffled(tmp_path, callback)
    assert callback.measured.keys() == {"stem", "first"}
    assert battery.differences(measured, shuffled(tmp_path, L.Callback())) == []


def test_measures_once_if_asked_to(tmp_path: Path) -> None:
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for remeasure, seen in found.items():

        class Look(SensitivenessCallback):
            def allocate(self, *args: Any, seen: list[dict[str, float]] = seen) -> Any:
                seen.append(dict(self.state.sensitiveness))
                return super().allocate(*args)

        battery.train(tmp_path, Look(keep=0.5, steps=3, remeasure=remeasure, **SETTINGS))
    assert found[False][0] == found[False][1] == found[False][2] == found[True][0]
    assert found[True][1] != found[True][0]


class Regression(battery.ResidualClassifier):
    """Its batches are no pairs of inputs and labels."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0])[:, 0] - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/error", self.training_step(batch, batch_idx))


def closeness(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the squared error, and a score that is higher where it is lower."""
    error = (model(batch[0])[:, 0] - batch[1]).square().mean()
    return error, (-error).exp()


def fit_regression(root: Path, callback: L.Callback, validate: bool = True) -> L.LightningModule:
    module = Regression()
    data = TensorDataset(battery.images(64).tensors[0], torch.linspace(0, 1, 64))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=root,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 16), DataLoader(data, 32) if validate else None)
    return module


def test_other_tasks_bring_their_own_measure_or_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pair of inputs and labels that are integers; .*pass `evaluate`"):
        fit_regression(tmp_path, SensitivenessCallback(keep=0.5, **SETTINGS))
    with pytest.raises(ValueError, match="measures on the validation split, and this run has none"):
        fit_regression(tmp_path, SensitivenessCallback(evaluate=closeness, **SETTINGS), validate=False)
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(L.Callback, "callback")
    path = f"{__name__}.closeness"
    config = {"class_path": "lightning_prune.callbacks.SensitivenessCallback"}
    config["init_args"] = {"keep": 0.5, "round_to": 1, "levels": [0.5], "limit_batches": 1, "evaluate": path}
    callback = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    module = fit_regression(tmp_path, callback)
    assert plan_in_force(module).budget["achieved"] <= 0.5


class Halves(IterableDataset[Any]):
    """The images of one rank, as Lightning asks of data that has no positions."""

    def __init__(self, part: Dataset[Any]) -> None:
        self.part = part

    def __iter__(self) -> Any:
        return (self.part[position] for position in range(32))


class Measured(SensitivenessCallback):
    """Notes on the first rank what it has measured."""

    def __init__(self, path: Path) -> None:
        super().__init__(**SETTINGS)
        self.__dict__["path"] = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.state.sensitiveness))


class Parted(L.LightningDataModule):
    """Gives each rank validation images of its own."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return battery.loaders()[0]

    def val_dataloader(self) -> DataLoader[Any]:
        whole, ranks = battery.images(64), self.trainer.world_size
        if ranks == 1:
            return DataLoader(whole, 32)
        part = Subset(whole, range(32 * self.trainer.global_rank, 32 * (self.trainer.global_rank + 1)))
        return DataLoader(Halves(part) if self.kind is Halves else part, 32)


@pytest.mark.parametrize("kind", [Halves, Subset])
def test_two_ranks_with_data_of_their_own_measure_what_one_measures_on_all(kind: type, tmp_path: Path) -> None:
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        L.seed_everything(0, verbose=False)
        path = tmp_path / f"{devices}.json"
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, use_distributed_sampler=False, callbacks=[Measured(path)],
        )  # fmt: skip
        trainer.fit(battery.ResidualClassifier(), datamodule=Parted(kind))
        found.append(json.loads(path.read_text()))
    assert found[1] == pytest.approx(found[0])
    assert len(set(found[0].values())) > 1
