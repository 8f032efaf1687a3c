"""Pruning after training in one call: the same as the steps by hand, on whatever batches and modules."""

import copy
from collections import UserDict
from typing import Any

import battery
import pytest
import torch
from engine import randomised
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune import post_training
from lightning_prune.pruning_plan import plan_in_force

IMAGES = battery.images(96).tensors[0]
PARTS = list(IMAGES.split(32))
LABELLED = [(part, torch.zeros(len(part))) for part in PARTS]


def network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten()]
    return randomised(nn.Sequential(*layers, nn.Linear(8 * 16, 4)))


def by_hand(model: nn.Module, keep: float, **settings: Any) -> nn.Module:
    graph = lp.trace(model, PARTS[0])
    plan = lp.plan(graph, lp.criteria.coherent_obs(graph, PARTS), keep, **settings)
    lp.prune(model, plan, compensate="refit", batches=PARTS)
    return model


def test_it_is_trace_score_plan_prune_and_refit() -> None:
    model = network().train()
    expected = by_hand(copy.deepcopy(model), 0.5, round_to=2)
    random = torch.get_rng_state()
    report = lp.prune_for(model, PARTS, keep=0.5, round_to=2)
    assert battery.differences(model, expected) == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert report.plan.digest == plan_in_force(model).digest
    assert report.plan.budget["achieved"] <= 0.5
    assert report.compensation.method == "refit"
    assert report.compensation.samples == 96


class Named(nn.Module):
    """Takes its inputs by name, and a flag that it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, images: Tensor, flag: bool = False) -> Tensor:
        return self.layers(images)


class Two(nn.Module):
    """Cannot do without two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.layers(first + second)


class OfDictionary(Named):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layers(batch["pixels"])


class OfList(Named):
    """Takes a list of images, as detectors do."""

    def forward(self, images: list[Tensor]) -> Tensor:
        if images[0].dim() != 3:
            raise ValueError("images have three axes")
        return self.layers(torch.stack(list(images)))


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        (network, LABELLED),
        (network, [list(batch) for batch in LABELLED]),
        (network, DataLoader(battery.images(96), 32)),
        (network, (part for part in PARTS)),
        (Named, LABELLED),
        (Named, [{"images": part, "label": 0} for part in PARTS]),
        (Named, [UserDict(images=part, label=torch.zeros(32)) for part in PARTS]),
        (Two, [(part / 2, part / 2, torch.zeros(32)) for part in PARTS]),
        (OfDictionary, [{"pixels": part} for part in PARTS]),
        (OfList, [(list(part), [{"label": 0}] * 32) for part in PARTS]),
        (network, [([part], [torch.zeros(32)]) for part in PARTS]),
    ],
    ids=[
        "pairs",
        "lists",
        "loader",
        "generator",
        "defaults",
        "dictionaries",
        "mappings",
        "two inputs",
        "one argument",
        "lists of images",
        "nested",
    ],
)
def test_batches_are_what_there_is(kind: Any, batches: Any) -> None:
    torch.manual_seed(1)
    model = kind()
    layers = model if isinstance(model, nn.Sequential) else model.layers
    expected = by_hand(copy.deepcopy(layers), 0.6, round_to=1)
    lp.prune_for(model, batches, keep=0.6, round_to=1)
    assert battery.differences(layers, expected) == []


def test_a_lightning_module_is_pruned_and_trains_on() -> None:
    torch.manual_seed(0)
    module = battery.ResidualClassifier()
    report = lp.prune_for(module, battery.loaders()[0], keep=0.4, metric="params", round_to=1, ignore=["stem"])
    assert report.plan.budget["metric"] == "params"
    assert set(report.widths) == {"first"}
    loss = module(IMAGES).square().mean()
    loss.backward()


def test_what_fails_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()
    before = copy.deepcopy(model)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(post_training, "prune", broken)
    with pytest.raises(MemoryError):
        lp.prune_for(model, PARTS, round_to=2)
    assert battery.differences(model, before) == []
    assert model.training
    assert plan_in_force(model) is None


def test_only_so_many_samples_are_drawn() -> None:
    drawn: list[int] = []

    def endless() -> Any:
        while True:
            drawn.append(128)
            yield torch.randn(128, 1, 8, 8)

    report = lp.prune_for(network(), endless(), round_to=2)
    assert sum(drawn) == report.compensation.samples == 512


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {}, "prune_for looks at data: give batches"),
        (IMAGES, {}, "batches must be a list or loader of batches; put a single batch into a list."),
        (PARTS, {"keep": 0.0}, "keep must be the fraction that is kept"),
        (PARTS, {"keep": 1e-6}, "cannot be reached"),
        (PARTS, {"metric": "macs"}, "metric must be one of"),
        (PARTS, {"compensate": "auto"}, "compensate must be one of none, statistics, fold, refit; got 'auto'."),
        (PARTS, {"ignore": ["*"]}, "prune_for finds nothing to prune: 0: is ignored by the pattern '*'; 3:"),
    ],
    ids=["none", "a tensor", "keep", "unreachable", "metric", "compensate", "ignored"],
)
def test_what_cannot_work_is_refused(batches: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        lp.prune_for(network(), batches, **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_follow_the_model_to_its_device() -> None:
    model = network().cuda()
    lp.prune_for(model, LABELLED, round_to=2)
    assert next(model.parameters()).is_cuda
    assert model.eval()(IMAGES.cuda()).shape == (96, 4)
