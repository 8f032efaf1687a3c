"""Criteria by name: one call for all, criteria of the user's own, settings from YAML."""

import re
from typing import Any

import pytest
import torch
import yaml
from engine import randomised
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import (
    AFIEEarlyPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    TaylorRankCallback,
)
from lightning_prune.criteria import CRITERIA, register, score
from lightning_prune.criteria.registry import find, needs_data


def largest_output(graph: lp.graph.ChannelGraph, batches: Any, loss: Any, scale: float = 1.0) -> dict[str, Tensor]:
    """A criterion of a user's own, known by its import path."""
    value = loss(graph.model, next(iter(batches))).item()
    return {name: torch.full((group.size,), scale * value) for name, group in graph.groups.items()}


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.fixture
def graph() -> lp.graph.ChannelGraph:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    return lp.trace(randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 3))), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    "name",
    [
        "apoz",
        "batch_norm_scale",
        "coherent_obs",
        "fpgm",
        "group_magnitude",
        "l1",
        "l2",
        "lamp",
        "magnitude",
        "mean_activation",
        "random",
        "taylor",
    ],
)
def test_all_have_one_signature_and_one_kind_of_result(name: str, graph: lp.graph.ChannelGraph) -> None:
    for _ in range(2):
        scores = score(graph, name, [torch.randn(4, 1, 8, 8)], loss)
        assert scores.keys() == graph.groups.keys()
        for group, values in scores.items():
            assert values.shape == (graph.groups[group].size,)
            assert values.is_floating_point()
            assert values.device.type == "cpu"
            assert not values.requires_grad
            assert values[graph.kept(group)].isfinite().all()
        plan = lp.plan(graph, scores, 0.6, round_to=1)
        lp.prune(graph.model, plan)


def test_settings_reach_the_criterion(graph: lp.graph.ChannelGraph) -> None:
    expected = lp.criteria.magnitude(graph, 3)
    for name, values in score(graph, {"name": "magnitude", "p": 3}).items():
        assert torch.equal(values, expected[name])


def test_a_criterion_of_ones_own(graph: lp.graph.ChannelGraph) -> None:
    @register("backwards")
    def backwards(graph: lp.graph.ChannelGraph, offset: float = 0.0) -> dict[str, Tensor]:
        return {name: offset - torch.arange(group.size) for name, group in graph.groups.items()}

    try:
        assert score(graph, {"name": "backwards", "offset": 1.5})["0"].tolist() == [1.5, 0.5, -0.5, -1.5]
        assert PruningCallback(criterion="backwards").criterion == "backwards"
    finally:
        del CRITERIA["backwards"]
    path = f"{__name__}.largest_output"
    assert needs_data(find(path))
    scores = score(graph, {"name": path, "scale": 0.0}, [torch.zeros(1, 1, 8, 8)], loss)
    assert scores["0"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("l3", "There is no criterion 'l3'; those known are apoz, batch_norm_scale, coherent_obs, fpgm,"),
        ("no.such.module", "There is no criterion 'no.such.module' (No module named 'no'): check the path"),
        ("math.pi", "There is no criterion 'math.pi'"),
        ({"name": "magnitude", "q": 2}, "Criterion 'magnitude' has no setting 'q'; it has p."),
        ({"name": "fpgm", "p": 2}, "Criterion 'fpgm' has no setting 'p'; it has none."),
        ({"name": "taylor", "loss": 1}, "Criterion 'taylor' has no setting 'loss'; it has variant, normalize,"),
        ({"p": 2}, "A criterion is a name, or a mapping with a name and settings; got {'p': 2}."),
        ("taylor", "Criterion 'taylor' needs data: give `batches` and `loss`."),
    ],
)
def test_what_does_not_fit_is_refused(criterion: Any, message: str, graph: lp.graph.ChannelGraph) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        score(graph, criterion)


def test_callbacks_refuse_a_criterion_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="There is no criterion 'l3'"):
        PruningCallback(criterion="l3")
    for kind, setting in ((PruningCallback, "criterion"), (AFIEEarlyPruneCallback, "within")):
        with pytest.raises(
            ValueError, match=rf"Criterion 'taylor' needs a loss, and {kind.__name__} scores without labels"
        ):
            kind(**{setting: "taylor"})
    with pytest.raises(ValueError, match="Criterion 'apoz' needs data, and RLJointPruneCallback gives it none"):
        RLJointPruneCallback(within="apoz")
    with pytest.raises(TypeError, match="criterion"):
        TaylorRankCallback(criterion="l2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the successor is not in every version that is allowed
@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("PruningCallback", "criterion: l2", {"criterion": "l2"}),
        ("PruningCallback", "{}", {"criterion": "coherent_obs", "compensate": "auto"}),
        ("PruningCallback", "{criterion: apoz, compensate: fold}", {"criterion": "apoz", "compensate": "fold"}),
        ("LearnToPruneCallback", "{}", {"criterion": "l1", "compensate": "none"}),
        ("PruningCallback", "criterion: {name: magnitude, p: 2}", {"criterion": {"name": "magnitude", "p": 2}}),
        ("TaylorRankCallback", "{variant: b, normalize: false}", {"variant": "b", "normalize": False}),
        ("AFIEEarlyPruneCallback", "{within: random, metric: channels}", {"criterion": "random", "metric": "channels"}),
    ],
)
def test_settings_from_yaml(kind: str, arguments: str, expected: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=PruningCallback)
    content = {"class_path": f"lightning_prune.callbacks.{kind}", "init_args": yaml.safe_load(arguments)}
    callback = parser.instantiate_classes(parser.parse_object({"callback": content})).callback
    assert type(callback).__name__ == kind
    assert {name: getattr(callback, name) for name in expected} == expected
