"""Numbers that are not finite are never ranked: what holds them is named."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import CostModel
from lightning_prune.search import AGENTS, make_agent
from lightning_prune.search.filter_agent import FilterSearch
from lightning_prune.search.pruning_problem import PruningProblem, accuracy_of
from lightning_prune.search.width_bounds import WidthBounds

BY_WEIGHTS = sorted(name for name in criteria.CRITERIA if name not in ("random", "first_come"))
ODD = {"NaN": math.nan, "infinite numbers": math.inf}
CHECKS: dict[str, Callable[[ChannelGraph], Any]] = {
    "afie": criteria.afie,
    "afie_flat": lambda graph: criteria.afie(graph, flatten=True),
    "sensitiveness": lambda graph: criteria.sensitiveness(graph, batches(), draws=1, levels=[0.5]),
    "sensitiveness_noise": lambda graph: criteria.sensitiveness(graph, batches(), "noise", draws=1, levels=[0.5]),
    "problem": lambda graph: PruningProblem(graph, metric="channels"),
    "reward": lambda graph: accuracy_of(graph, batches())([graph.plan({})]),
    "filters": lambda graph: FilterSearch(graph, "0", WidthBounds(graph, CostModel(graph, "channels"), 0.5), [8, 6]),
}


def graph() -> ChannelGraph:
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return lp.trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 4)).eval(), torch.zeros(2, 1, 8, 8))


def batches(spoilt: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    made = [(torch.randn(8, 1, 8, 8), torch.randint(4, (8,))) for _ in range(3)]
    made[1][0][3, 0, 2, 2] += spoilt
    return made


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def spoil(traced: ChannelGraph, name: str, value: float) -> None:
    with torch.no_grad():
        traced.model.get_parameter(name).view(-1)[1] = value


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_every_criterion_names_the_parameter(name: str, value: str) -> None:
    traced = graph()
    spoilt = "1.weight" if name == "batch_norm_scale" else "0.weight"
    spoil(traced, spoilt, ODD[value])
    with pytest.raises(ValueError, match=re.escape(f"the parameter '{spoilt}' holds {value}; lower the learning rate")):
        lp.plan(traced, criteria.score(traced, name, batches(), loss), metric="channels", round_to=1)


@pytest.mark.filterwarnings("ignore:Sequential does not repeat")  # as NaN is not NaN
@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", CHECKS)
def test_layer_scores_rewards_and_agents_name_the_parameter(name: str, value: str) -> None:
    traced = graph()
    spoil(traced, "0.weight", ODD[value])
    with pytest.raises(ValueError, match=re.escape("'0.weight'")):
        CHECKS[name](traced)


@pytest.mark.parametrize("name", ["taylor", "mean_activation", "apoz", "oracle", "sensitiveness", "reward"])
def test_what_needs_data_names_the_batch(name: str) -> None:
    traced, data = graph(), batches(math.nan)
    measures: dict[str, Callable[[], Any]] = {
        "sensitiveness": lambda: criteria.sensitiveness(traced, data, draws=1, levels=[0.5]),
        "reward": lambda: accuracy_of(traced, data)([traced.plan({})]),
    }
    if name == "taylor":  # which leaves such steps out, as optimizers do, unless there are no others
        assert all(bool(values.isfinite().all()) for values in criteria.score(traced, name, data, loss).values())
        data = data[1:2]
    number = 0 if name == "taylor" else 1
    with pytest.raises(ValueError, match=rf"batch {number} \(counted from 0\) holds NaN"):
        measures.get(name, lambda: criteria.score(traced, name, data, loss))()


@pytest.mark.parametrize("variant", ["a", "b", "c", "gate", "sum_then_square", "square_then_sum"])
def test_taylor_tells_losses_and_gradients_that_are_not_finite(variant: str) -> None:
    settings = {"name": "taylor", "variant": variant}
    traced = graph()

    def told(data: list[Any], of: Callable[..., Tensor]) -> str:
        with pytest.raises(ValueError, match=r"^No finite gradient was seen of 0, 3: ") as raised:
            criteria.score(traced, settings, data, of)
        return str(raised.value)

    def without_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model, batch) * math.nan

    def without_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) * 0).abs().sqrt().sum()  # 0, with the slope of the root there

    assert "the loss was NaN or infinite in 3 of 3 steps; lower" in told(batches(), without_loss)
    assert "the gradients were NaN or infinite in 3 of 3 steps; lower" in told(batches(), without_gradients)
    assert "no batch, or the loss does not need them" in told([], loss)


def test_scores_of_a_stranger_are_not_ranked_either() -> None:
    traced = graph()
    scores = {name: torch.rand(group.size) for name, group in traced.groups.items()}
    scores["3"][2] = math.nan
    with pytest.raises(ValueError, match="scores of group '3' are not finite, though all parameters are"):
        lp.plan(traced, scores)
    scores["3"][2] = math.inf  # keep this one, whatever it costs
    assert 2 in lp.plan(traced, scores, metric="channels", round_to=1).groups["3"].kept
    spoil(traced, "3.bias", math.inf)
    with pytest.raises(
        ValueError, match=r"scores of group '3' are not finite, as the parameter '3.bias' holds infinite"
    ):
        lp.plan(traced, scores)


@pytest.mark.parametrize("accuracy", [math.nan, math.inf, -math.inf])
def test_a_measure_that_is_no_number_is_refused(accuracy: float) -> None:
    with pytest.raises(ValueError, match=r"`evaluate` has returned an accuracy of .*, by which nothing can be ranked"):
        evaluate_candidates(graph(), [{}], batches(), evaluate=lambda model, batch: (0.0, accuracy))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", sorted(set(AGENTS) - {"random"}))
def test_agents_that_have_learned_too_fast_say_so(name: str, greedy: bool) -> None:
    agent = make_agent(name, 3, 1, seed=0)
    role, module = next((role, one) for role, one in agent._stateful().items() if isinstance(one, nn.Module))
    parameter, tensor = next(module.named_parameters())
    tensor.data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"The parameter '{parameter}' in the {role} of .* lower its learning_rate"):
        agent.act([0.1, 0.2, 0.3], greedy=greedy)


class Exploding(battery.ResidualClassifier):
    """Has no finite loss from some step on."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * math.nan


@pytest.mark.parametrize("name", ["taylor", "taylor_gate"])
def test_taylor_in_training_says_that_no_loss_was_finite(name: str, tmp_path: Path) -> None:
    message = (
        r"TaylorRankCallback has seen no finite gradients before epoch 1: the loss was NaN or infinite in 6 of 6 "
        "steps, and the parameter 'stem.weight' holds NaN; lower the learning rate"
    )
    with pytest.raises(RuntimeError, match=message):
        battery.train(tmp_path, battery.make_callback(name), module=Exploding())


def test_magnitude_in_training_names_the_parameter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as the parameter 'stem.weight' holds NaN; lower the learning rate"):
        battery.train(tmp_path, battery.make_callback("magnitude"), module=Exploding())
