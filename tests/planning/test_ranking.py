"""Rankings: what a channel is compared with."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prune as lp
from lightning_prune.callbacks import (
    AFIEEarlyPruneCallback,
    LearnToPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    SensitivenessCallback,
    TaylorRankCallback,
)
from lightning_prune.models import SmallImageViT
from lightning_prune.planning import CostModel, isomorphic_groups, plan_by_layer, reachable
from lightning_prune.planning.ranking import isomorphic_ranking

IMAGES = torch.zeros(1, 1, 6, 6)


def four_convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))


class Stages(nn.Module):
    """Residual blocks of two widths, convolutions with and without normalisation, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList([self.block(8, 6), self.block(8, 6), self.block(16, 12)])
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.hidden = nn.Linear(16, 10)
        self.head = nn.Linear(10, 2)

    def block(self, width: int, hidden: int) -> nn.Sequential:
        first, second = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(hidden), nn.ReLU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks[:2]:
            x = x + block(x)
        x = self.down(x)
        x = x + self.blocks[2](x)
        return self.head(self.hidden(x.mean((2, 3))).relu())


STAGES = lp.trace(Stages(), IMAGES)


def random_scores(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Each group on a scale of its own, which says nothing.
    return {
        name: torch.rand(group.size, generator=generator) * 10.0**number
        for number, (name, group) in enumerate(STAGES.groups.items())
    }


def test_a_case_by_hand() -> None:
    """Of 12 channels 6 are kept: 2 of the 4 that go from a 3x3 kernel into a 1x1, 4 of the 8 between 1x1 kernels."""
    graph = lp.trace(four_convolutions(), IMAGES)
    assert isomorphic_groups(graph) == [["0"], ["1", "2"]]
    scores = {
        "0": torch.tensor([0.4, 0.3, 0.2, 0.1]),
        "1": torch.tensor([8.0, 5.0, 6.0, 1.0]),
        "2": torch.tensor([7.0, 2.0, 3.0, 4.0]),
    }
    made = lp.plan(graph, scores, 0.5, "channels", round_to=1, ranking="isomorphic")
    assert {name: group.kept for name, group in made.groups.items()} == {"0": (0, 1), "1": (0, 1, 2), "2": (0,)}
    in_one_list = lp.plan(graph, scores, 0.5, "channels", round_to=1)
    assert in_one_list.widths == {"0": 1, "1": 3, "2": 2}


def test_groups_are_built_alike_whatever_their_names_and_widths() -> None:
    classes = isomorphic_groups(STAGES)
    assert classes == [["stem"], ["blocks.0.0", "blocks.1.0", "blocks.2.0"], ["blocks.2.3"], ["hidden"]]


def test_in_a_vision_transformer_each_kind_of_layer_is_compared_across_blocks() -> None:
    network = SmallImageViT(in_channels=1, image_size=8, width=8, depth=3, num_heads=2, hidden=12)
    graph = lp.trace(network, torch.zeros(1, 1, 8, 8))
    hidden, values = ([f"blocks.{block}.{name}" for block in range(3)] for name in ("linear1", "attention.value"))
    classes = isomorphic_groups(graph)
    assert hidden in classes
    assert values in classes
    scores = lp.criteria.l1(graph)
    for number, name in enumerate(hidden):
        scores[name] = torch.arange(12.0) + 12 * number  # the last block scores highest, and the first one lowest
    plan = lp.plan(graph, scores, 0.5, "channels", round_to=1, ranking="isomorphic")
    first, middle, last = (plan.widths[name] for name in hidden)
    assert (first, last) == (1, 12)
    assert first < middle < last  # the share that all classes keep lies in it


def test_kinds_and_module_types_are_told_apart() -> None:
    graph = lp.trace(four_convolutions(), IMAGES)
    graph.groups["2"] = replace(graph.groups["2"], kind="heads")
    assert isomorphic_groups(graph) == [["0"], ["1"], ["2"]]

    class Other(nn.Conv2d):
        pass

    model = nn.Sequential(*four_convolutions()[:3], Other(4, 2, 1))
    assert isomorphic_groups(lp.trace(model, IMAGES)) == [["0"], ["1"], ["2"]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.1, 1.0),
    metric=st.sampled_from(["flops", "params", "channels"]),
    round_to=st.sampled_from([1, 2]),
)
def test_every_class_gives_the_same_share(seed: int, keep: float, metric: str, round_to: int) -> None:
    """Beside what a sort of each class and a search over shares come to."""
    if keep < reachable(STAGES, metric, round_to):
        return
    scores = random_scores(seed)
    plan = lp.plan(STAGES, scores, keep, metric, round_to, ranking="isomorphic")
    cost = CostModel(STAGES, metric)
    assert plan.budget["achieved"] <= keep
    low, high = 0.0, 1.0  # a bisection over shares instead of over channels
    for _ in range(20):
        middle = (low + high) / 2
        fits = cost(rounded(widths_at(middle, scores), round_to)) <= keep * cost.original
        low, high = (low, middle) if fits else (middle, high)
    best = rounded(widths_at(high, scores), round_to)
    if cost(best) < 0.95 * keep * cost.original:
        return  # groups may exchange channels
    for name, width in best.items():  # what rounding saved of the budget widens groups, and narrows none
        assert plan.widths[name] >= width
        group = plan.groups[name]
        if len(group.kept) < group.size:
            assert scores[name][list(group.kept)].min() >= scores[name][group.pruned].max()


def rounded(widths: dict[str, int], round_to: int) -> dict[str, int]:
    most = {name: group.size for name, group in STAGES.groups.items()}
    return {
        name: width if width == most[name] else max(width // round_to * round_to, round_to)
        for name, width in widths.items()
    }


def widths_at(share: float, scores: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return what is kept of each group when each class has given a share, to the nearest channel."""
    widths = {}
    for names in isomorphic_groups(STAGES):
        of_class = sorted(((float(score), name) for name in names for score in scores[name]), reverse=True)
        kept = [name for _, name in of_class[: math.floor(len(of_class) * (1 - share) + 0.5)]]
        widths.update({name: kept.count(name) for name in names})
    return widths


def test_scales_of_classes_do_not_matter_and_those_within_do() -> None:
    scores = random_scores(0)
    plan = lp.plan(STAGES, scores, 0.5, "channels", round_to=1, ranking="isomorphic")
    scaled = {name: value * (1e-9 if name == "hidden" else 1) for name, value in scores.items()}
    assert lp.plan(STAGES, scaled, 0.5, "channels", round_to=1, ranking="isomorphic") == plan
    assert plan.widths["blocks.0.0"] < plan.widths["blocks.2.0"]  # which scores higher by its scale
    assert lp.plan(STAGES, scaled, 0.5, "channels", round_to=1) != lp.plan(STAGES, scores, 0.5, "channels", round_to=1)


def test_of_single_groups_it_is_the_uniform_allocation() -> None:
    graph = lp.trace(nn.Sequential(nn.Conv2d(1, 8, 5), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), IMAGES)
    assert isomorphic_groups(graph) == [["0"], ["1"]]
    scores = lp.criteria.l1(graph)
    uniform = plan_by_layer(graph, dict.fromkeys(graph.groups, 1.0), scores, 0.5, round_to=1)
    assert lp.plan(graph, scores, 0.5, round_to=1, ranking="isomorphic") == uniform


def test_prunes_in_steps_count_from_the_original() -> None:
    model = Stages()
    graph = lp.trace(model, IMAGES)
    scores = random_scores(3)
    lp.prune(model, lp.plan(graph, scores, 0.8, round_to=1, ranking="isomorphic"))
    left = {name: value.clone() for name, value in scores.items()}
    for name in graph.groups:
        pruned = torch.ones(graph.groups[name].size, dtype=torch.bool)
        pruned[graph.kept(name)] = False
        left[name][pruned] = -math.inf
    second = lp.plan(graph, left, 0.5, round_to=1, ranking="isomorphic")
    assert isomorphic_groups(graph) == isomorphic_groups(STAGES)
    assert second.widths == lp.plan(STAGES, scores, 0.5, round_to=1, ranking="isomorphic").widths
    lp.prune(model, second)


def test_groups_that_keep_all_channels_count_in_no_class() -> None:
    names = ["blocks.0.0", "blocks.1.0", "blocks.2.0"]
    scores = {name: torch.arange(STAGES.groups[name].size, dtype=torch.float64) for name in names}
    scores |= {name: torch.full((group.size,), math.inf) for name, group in STAGES.groups.items() if name not in names}
    ranking = isomorphic_ranking(STAGES, {**scores, "blocks.2.0": torch.full((12,), math.inf)})
    assert bool(ranking["blocks.2.0"].isinf().all())
    shares = sorted(torch.cat([ranking["blocks.0.0"], ranking["blocks.1.0"]]).tolist())
    assert shares[0] == 0.5 / 12
    assert all(after - before == pytest.approx(1 / 12) for before, after in pairwise(shares))
    plan = lp.plan(STAGES, {"hidden": torch.rand(10)}, 0.99, "params", 1, ranking="isomorphic")
    assert [name for name, width in plan.widths.items() if width < STAGES.groups[name].size] == ["hidden"]


@pytest.mark.parametrize("callback", [PruningCallback, TaylorRankCallback])
def test_callbacks_that_plan_by_scores_hand_it_on(callback: type[PruningCallback]) -> None:
    scores = random_scores(5)
    made = callback(keep=0.5, round_to=1, ranking="isomorphic").allocate(STAGES, scores, 0.5)
    assert made == lp.plan(STAGES, scores, 0.5, round_to=1, ranking="isomorphic")
    assert callback(keep=0.5, round_to=1).allocate(STAGES, scores, 0.5) == lp.plan(STAGES, scores, 0.5, round_to=1)


def test_a_trained_network_is_pruned_by_it() -> None:
    model, other = Stages(), Stages()
    other.load_state_dict(model.state_dict())
    batches = [torch.randn(32, 1, 6, 6)]
    report = lp.prune_for(model, batches, keep=0.4, round_to=1, ranking="isomorphic")
    assert report.plan.widths != lp.prune_for(other, batches, keep=0.4, round_to=1).plan.widths
    assert report.plan.budget["achieved"] <= 0.4
    assert model(torch.randn(2, 1, 6, 6)).shape == (2, 2)


@pytest.mark.parametrize(
    "callback", [AFIEEarlyPruneCallback, LearnToPruneCallback, RLJointPruneCallback, SensitivenessCallback]
)
def test_where_it_has_no_meaning_it_is_refused(callback: type[PruningCallback]) -> None:
    with pytest.raises(ValueError, match=f"{callback.__name__} decides by a method of its own .*; leave it out"):
        callback(ranking="isomorphic")


def test_other_rankings_are_refused() -> None:
    for ask in (
        lambda: lp.plan(STAGES, random_scores(0), 0.5, ranking="local"),
        lambda: lp.prune_for(Stages(), [IMAGES], ranking="local"),
        lambda: PruningCallback(ranking="local"),
    ):
        with pytest.raises(ValueError, match="ranking must be one of global, isomorphic; got 'local'"):
            ask()
