"""From scores to plans: budgets kept, rounding, refusals."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_prune as lp
from lightning_prune.planning import CostModel, check_reachable, narrow_groups, plan_by_layer, reachable


class Network(nn.Module):
    """A residual network with a grouped convolution, small enough for many plans."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 1)
        self.one = nn.Conv2d(24, 16, 1)
        self.two = nn.Conv2d(16, 24, 1)
        self.make = nn.Conv2d(24, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 1, groups=8)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.two(self.one(x))
        return self.head(self.grouped(self.make(x)))


MODEL = Network()
GRAPH = lp.trace(MODEL, torch.zeros(1, 3, 4, 4))


def random_scores(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(group.size, generator=generator) ** 3 for name, group in GRAPH.groups.items()}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.05, 1.0),
    metric=st.sampled_from(["flops", "params", "channels"]),
    round_to=st.sampled_from([1, 2, 3, 8]),
)
def test_the_budget_is_kept_within_one_rounding_step(seed: int, keep: float, metric: str, round_to: int):
    lowest = reachable(GRAPH, metric, round_to)
    if keep < lowest:
        with pytest.raises(ValueError, match=f"between {lowest:.3f} and 1 can be kept"):
            lp.plan(GRAPH, random_scores(seed), keep, metric, round_to)
        return
    plan = lp.plan(GRAPH, random_scores(seed), keep, metric, round_to)
    cost = CostModel(GRAPH, metric)
    assert cost(plan.widths) <= keep * cost.original
    assert plan.budget["achieved"] == cost(plan.widths) / cost.original
    assert plan.budget["reachable"] == lowest <= plan.budget["rounded"] <= plan.budget["achieved"]
    for name, width in plan.widths.items():
        group = GRAPH.groups[name]
        multiple = plan.budget.get("finer", {}).get(name, round_to)
        step = multiple // math.gcd(multiple, group.width)
        assert width == group.size or width % step == 0
        if width < group.size:  # no group could be given one more step
            wider = {**plan.widths, name: min(width + step, group.size)}
            assert cost(wider) > keep * cost.original


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.2, 0.9))
def test_each_group_keeps_its_best_channels(seed: int, keep: float):
    scores = random_scores(seed)
    for name, group in lp.plan(GRAPH, scores, keep, round_to=1).groups.items():
        kept = scores[name][list(group.kept)]
        if len(group.kept) < group.size:
            assert kept.min() >= scores[name][group.pruned].max()


def test_grouped_widths_are_rounded_in_channels_of_the_layer():
    plan = lp.plan(GRAPH, random_scores(0), 0.5, round_to=8)
    assert GRAPH.groups["make"].width == 4
    assert plan.widths["make"] % 2 == 0  # two convolution groups of four channels


def test_equal_scores_are_broken_by_order():
    scores = {name: torch.ones(group.size) for name, group in GRAPH.groups.items()}
    plan = lp.plan(GRAPH, scores, 0.5, round_to=1)
    for group in plan.groups.values():
        assert group.kept == tuple(range(len(group.kept)))


def test_groups_without_scores_keep_all_channels():
    plan = lp.plan(GRAPH, {"one": torch.rand(16)}, 0.95, round_to=1)
    assert plan.widths["stem"] == 24
    assert plan.widths["make"] == 8
    assert plan.widths["one"] < 16


def test_least_number_of_channels():
    scores = random_scores(0) | {"one": torch.zeros(16)}
    assert lp.plan(GRAPH, scores, 0.5, round_to=1).widths["one"] == 1
    assert lp.plan(GRAPH, scores, 0.5, round_to=1, min_channels=5).widths["one"] == 5
    assert lp.plan(GRAPH, scores, 0.7, round_to=4, min_channels=5).widths["one"] == 8


def test_channels_that_are_pruned_are_not_kept():
    model = Network()
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    first = lp.plan(graph, lp.criteria.magnitude(graph), 0.7, round_to=1)
    lp.prune(model, first)
    second = lp.plan(graph, lp.criteria.magnitude(graph), 0.4, round_to=1)
    for name, group in second.groups.items():
        assert set(group.kept) <= set(first.groups[name].kept)
    lp.prune(model, second)
    assert CostModel(graph, "params")(second.widths) == sum(p.numel() for p in model.parameters())


def test_nan_scores_name_the_group():
    with pytest.raises(ValueError, match="The scores of group 'one' are not finite"):
        lp.plan(GRAPH, {"one": torch.full((16,), math.nan)})


def test_scores_must_fit():
    with pytest.raises(ValueError, match=r"Group 'one' has 16 channels, but its scores have shape \(15,\)"):
        lp.plan(GRAPH, {"one": torch.rand(15)})
    with pytest.raises(ValueError, match="'other' is no channel group"):
        lp.plan(GRAPH, {"other": torch.rand(15)})


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, True, "half", math.nan])
def test_keep_must_be_a_fraction(keep: object):
    with pytest.raises(ValueError, match="keep must be the fraction that is kept"):
        lp.plan(GRAPH, random_scores(0), keep)


@pytest.mark.parametrize("setting", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_rounding_must_be_a_whole_number(setting: str, value: object):
    with pytest.raises(ValueError, match=f"{setting} must be a whole number of at least 1"):
        lp.plan(GRAPH, random_scores(0), 0.5, **{setting: value})


def test_keeping_all_keeps_all():
    plan = lp.plan(GRAPH, random_scores(0), 1.0)
    assert plan.widths == {name: group.size for name, group in GRAPH.groups.items()}
    assert plan.index() == {}


def test_a_budget_that_cannot_be_reached_is_told_in_one_sentence():
    sentence = (
        r"keep=0.01 of the params cannot be reached: between 0.\d+ and 1 can be kept with round_to=8 and min_channels=2"
    )
    with pytest.raises(ValueError, match=sentence + r"\. Raise keep, or lower round_to\.$"):
        check_reachable(GRAPH, 0.01, "params", 8, 2)
    with pytest.raises(ValueError, match=sentence + r"\. Raise keep, or lower round_to\.$"):
        lp.plan(GRAPH, random_scores(0), 0.01, "params", 8, 2)
    with pytest.raises(ValueError, match=sentence + ", and at most 0.9 of a layer may be pruned"):
        plan_by_layer(GRAPH, dict.fromkeys(GRAPH.groups, 1.0), random_scores(0), 0.01, "params", 8, 2, cap=0.9)
    check_reachable(GRAPH, reachable(GRAPH, "params", 8, 2), "params", 8, 2)


@pytest.mark.parametrize("metric", ["flops", "params", "channels"])
def test_the_multiple_is_chosen_for_time_alone(metric: str):
    refused = [
        lambda: lp.plan(GRAPH, random_scores(0), 0.5, metric, "auto"),
        lambda: plan_by_layer(GRAPH, dict.fromkeys(GRAPH.groups, 1.0), random_scores(0), 0.5, metric, "auto"),
        lambda: reachable(GRAPH, metric, "auto"),
        lambda: check_reachable(GRAPH, 0.5, metric, "auto"),
    ]
    for ask in refused:
        with pytest.raises(ValueError, match="round_to must be a whole number of at least 1; got 'auto'"):
            ask()


def test_a_plan_tells_its_budget_in_plain_values():
    budget = lp.plan(GRAPH, random_scores(0), 0.5, "params", 1).budget
    assert json.loads(json.dumps(budget)) == budget
    assert list(budget) == [
        "metric",
        "asked",
        "reachable",
        "rounded",
        "achieved",
        "original",
        "round_to",
    ]  # "finer" besides, where a group is
    assert (budget["metric"], budget["asked"], budget["round_to"]) == ("params", 0.5, 1)
    assert budget["original"] == sum(p.numel() for p in MODEL.parameters())


# -- one number per layer ----------------------------------------------------------------------------------------------


def naive_widths(layer_scores: dict[str, float], t: float, cap: float) -> dict[str, int]:
    """The widths that the rule asks for, as the nearest whole numbers under the cap."""
    return {
        name: max(
            math.floor(group.size * (1 - t / layer_scores[name]) + 0.5),
            math.ceil(group.size * (1 - cap) - 1e-9),
            1,
        )
        for name, group in GRAPH.groups.items()
    }


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.1, 1.0),
    metric=st.sampled_from(["flops", "params", "channels"]),
    cap=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
)
def test_layers_lose_the_inverse_of_their_layer_score(seed: int, keep: float, metric: str, cap: float):
    generator = torch.Generator().manual_seed(seed)
    layer_scores = {name: float(torch.rand((), generator=generator)) + 0.05 for name in GRAPH.groups}
    cost = CostModel(GRAPH, metric)
    if keep < reachable(GRAPH, metric, 1, 1, cap):
        with pytest.raises(ValueError, match="cannot be reached"):
            plan_by_layer(GRAPH, layer_scores, random_scores(seed), keep, metric, 1, cap=cap)
        return
    plan = plan_by_layer(GRAPH, layer_scores, random_scores(seed), keep, metric, 1, cap=cap)
    low, high = 0.0, 2 * max(layer_scores.values())  # a bisection of its own, over t instead of over channels
    for _ in range(60):
        middle = (low + high) / 2
        widths = naive_widths(layer_scores, middle, cap)
        low, high = (low, middle) if cost(widths) <= keep * cost.original else (middle, high)
    asked = naive_widths(layer_scores, high, cap)
    assert plan.budget["rounded"] == pytest.approx(cost(asked) / cost.original)
    if cost(naive_widths(layer_scores, high, cap)) < 0.95 * keep * cost.original:
        return  # groups may exchange channels
    for name, width in asked.items():  # what rounding saved of the budget widens groups, and narrows none
        assert plan.widths[name] >= width >= (1 - cap) * GRAPH.groups[name].size - 1e-9


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.2, 0.95), round_to=st.sampled_from([1, 2, 8]))
def test_by_layer_within_one_rounding_step(seed: int, keep: float, round_to: int):
    layer_scores, cost = dict.fromkeys(GRAPH.groups, 1.0), CostModel(GRAPH, "flops")
    if keep < reachable(GRAPH, "flops", round_to, cap=0.99):
        return
    scores = random_scores(seed)
    plan = plan_by_layer(GRAPH, layer_scores, scores, keep, round_to=round_to)
    assert plan.budget["achieved"] <= keep
    for name, group in plan.groups.items():
        multiple = plan.budget.get("finer", {}).get(name, round_to)
        step = multiple // math.gcd(multiple, GRAPH.groups[name].width)
        width = len(group.kept)
        assert width == group.size or width % step == 0
        if width < group.size:
            assert cost({**plan.widths, name: min(width + step, group.size)}) > keep * cost.original
            assert scores[name][list(group.kept)].min() >= scores[name][group.pruned].max()


def test_equal_layer_scores_are_the_uniform_allocation():
    for keep in (0.25, 0.5, 0.75):
        plan = plan_by_layer(GRAPH, dict.fromkeys(GRAPH.groups, 7.0), random_scores(1), keep, "channels", 1)
        assert plan.widths == {name: group.size * keep for name, group in GRAPH.groups.items()}


def test_by_layer_after_a_prune_counts_from_the_original():
    """The channels kept by a first plan are narrowed as if the two plans had been one."""
    model = Network()
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    layer_scores, scores = {"stem": 1.0, "one": 2.0, "make": 3.0}, random_scores(3)
    lp.prune(model, plan_by_layer(graph, layer_scores, scores, 0.7, round_to=1))
    for name in graph.groups:
        pruned = torch.ones(graph.groups[name].size, dtype=torch.bool)
        pruned[graph.kept(name)] = False
        scores[name][pruned] = -math.inf
    second = plan_by_layer(graph, layer_scores, scores, 0.4, round_to=1)
    assert second == plan_by_layer(GRAPH, layer_scores, random_scores(3), 0.4, round_to=1)
    lp.prune(model, second)
    assert CostModel(graph, "params")(second.widths) == sum(p.numel() for p in model.parameters())


def test_groups_without_layer_score_keep_all_channels():
    assert plan_by_layer(GRAPH, {"stem": 1.0}, random_scores(0), 0.8, round_to=1).widths["make"] == 8


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_layer_scores_must_be_positive(value: float):
    with pytest.raises(ValueError, match="The layer score of group 'one' must be a finite number above 0"):
        plan_by_layer(GRAPH, {"one": value}, random_scores(0))


@pytest.mark.parametrize("cap", [0, 1.5, math.nan])
def test_the_cap_must_be_a_fraction(cap: float):
    with pytest.raises(ValueError, match="cap must be the greatest fraction"):
        plan_by_layer(GRAPH, {"one": 1.0}, random_scores(0), cap=cap)


# -- nothing to prune, nothing to score --------------------------------------------------------------------------------

WITHOUT_GROUPS = {
    "an output": (nn.Linear(3, 10), torch.zeros(1, 3)),
    "no parameters": (nn.ReLU(), torch.zeros(1, 3)),
    "no samples": (nn.Linear(3, 10), torch.zeros(0, 3)),
    "all together": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1)),
        torch.zeros(1, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("metric", ["flops", "params", "channels", "latency"])
@pytest.mark.parametrize("case", WITHOUT_GROUPS)
def test_a_network_without_groups_is_refused_by_one_sentence(case: str, metric: str):
    graph = lp.trace(*WITHOUT_GROUPS[case])
    assert not graph.groups
    sentence = f"keep=0.5 of the {metric} cannot be reached: between 1.000 and 1 can be kept"
    scores = lp.criteria.magnitude(graph)
    with pytest.raises(ValueError, match=sentence):
        lp.plan(graph, scores, keep=0.5, metric=metric)
    with pytest.raises(ValueError, match=sentence):
        plan_by_layer(graph, {}, scores, 0.5, metric)
    with pytest.raises(ValueError, match=sentence):
        check_reachable(graph, 0.5, metric)
    assert reachable(graph, metric) == 1
    assert lp.plan(graph, scores, keep=1.0, metric=metric).widths == {}


def test_a_budget_of_a_network_that_costs_nothing_is_refused_too():
    graph = lp.trace(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3)), torch.zeros(0, 4))  # no samples
    with pytest.raises(ValueError, match=r"of the flops cannot be reached: between 1\.000 and 1"):
        lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5)
    assert lp.plan(graph, lp.criteria.magnitude(graph), keep=0.53, metric="params").widths == {"0": 8}


@pytest.mark.parametrize("name", ["l1", "l2", "group_magnitude", "fpgm", "lamp"])
def test_a_model_without_values_is_named(name: str):
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).to("meta")
    graph = lp.trace(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device and has no values; load the weights"):
        lp.criteria.CRITERIA[name](graph)


def test_no_time_is_measured_of_a_model_without_values():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).to("meta")
    graph = lp.trace(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="A model on the meta device has no values to run with"):
        check_reachable(graph, 0.5, "latency")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_filters_without_weights_can_be_scored():
    graph = lp.trace(nn.Sequential(nn.Linear(0, 16), nn.ReLU(), nn.Linear(16, 3)), torch.zeros(2, 0))
    assert lp.criteria.magnitude(graph)["0"].tolist() == [0.0] * 16


def test_groups_are_narrow_beside_what_is_kept_of_all() -> None:
    layers = [nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 20), nn.Linear(20, 1)]
    graph = lp.trace(nn.Sequential(*layers), torch.zeros(1, 1))
    kept = {"0": torch.arange(2), "1": torch.arange(40), "2": torch.arange(20)}  # 62 of 100
    assert narrow_groups(graph, graph.plan(kept)) == {"0": 0.05}
    kept = {"0": torch.arange(2), "1": torch.arange(14), "2": torch.arange(20)}  # 36 of 100
    assert narrow_groups(graph, graph.plan(kept)) == {}
    assert narrow_groups(graph, graph.plan({})) == {}
