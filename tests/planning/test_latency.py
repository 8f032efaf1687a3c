"""Budgets of measured time, with clocks that the tests set."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine import randomised
from torch import nn

import lightning_prune as lp
from lightning_prune import planning
from lightning_prune.graph.channel_graph import Axis, Term
from lightning_prune.planning import by_time, metrics, plan_by_layer, profiling
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.profiling import profile
from lightning_prune.planning.reachability import check_reachable
from lightning_prune.planning.segments import Segment
from lightning_prune.planning.stand_ins import at_widths
from lightning_prune.planning.tables import TABLE

IMAGE = torch.zeros(2, 3, 12, 12)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)
        )
    )


def clock(graph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
    """Return what a machine of known speed takes: a constant, and something for each channel and each operation."""
    one, two = widths.get("0", 32), widths.get("3", 64)
    return {
        Segment("", 0): 0.5,
        Segment("0", 0): 1 + 0.02 * one,
        Segment("1", 0): 0.01 * one,
        Segment("3", 0): 0.3 + 0.001 * one * two + 0.005 * two,
        Segment("5", 0): 0.2 + 0.003 * two,
    }


def time_of(widths: dict[str, int]) -> float:
    return sum(clock(None, widths, 1).values())


def test_the_profile_learns_what_the_machine_does(monkeypatch):
    monkeypatch.setattr(profiling, "time_segments", clock)
    graph = lp.trace(network(), IMAGE)
    profile(graph, samples=12)
    cost = CostModel(graph, "latency")
    for widths in ({}, {"0": 5}, {"3": 17}, {"0": 1, "3": 1}, {"0": 31, "3": 40}):
        assert cost(widths) == pytest.approx(time_of(widths), rel=1e-6)


@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_the_profile_learns_in_what_blocks_kernels_work(monkeypatch, multiple):
    """Layers whose time goes up by steps, as those of a CPU do: each length counts as the next multiple."""

    def stairs(graph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
        one, two = (math.ceil(width / multiple) * multiple for width in (widths.get("0", 32), widths.get("3", 64)))
        return {Segment("0", 0): 1 + 0.02 * one, Segment("3", 0): 0.3 + 0.001 * one * two, Segment("5", 0): 0.003 * two}

    monkeypatch.setattr(profiling, "time_segments", stairs)
    graph = lp.trace(network(), IMAGE)
    profile(graph, samples=24)
    for again in (graph, lp.trace(network(), IMAGE)):  # the second reads what the first has stored
        profile(again)
        cost = CostModel(again, "latency")
        for one, two in ((32, 64), (17, 40), (16, 24), (5, 8), (31, 56)):  # wide layers are tried at multiples of 8
            taken = sum(stairs(again, {"0": one, "3": two}, 1).values())
            assert cost({"0": one, "3": two}) == pytest.approx(taken, rel=1e-6)


def test_the_profile_learns_what_it_costs_that_blocks_are_not_filled(monkeypatch):
    """A runtime that copies what does not fill blocks of 16 channels: 24 take longer than 32."""

    def copies(graph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
        one, two = widths.get("0", 32), widths.get("3", 64)
        copied = 0.04 * one * (one % 16 > 0) + 0.01 * two * (two % 16 > 0)
        return {Segment("0", 0): 1 + 0.02 * one, Segment("3", 0): 0.3 + 0.001 * one * two + copied}

    monkeypatch.setattr(profiling, "time_segments", copies)
    graph = lp.trace(network(), IMAGE)
    profile(graph, samples=24)
    for again in (graph, lp.trace(network(), IMAGE)):  # the second reads what the first has stored
        profile(again)
        cost = CostModel(again, "latency")
        for one, two in ((32, 64), (16, 40), (24, 32), (5, 8), (31, 48)):
            taken = sum(copies(again, {"0": one, "3": two}, 1).values())
            assert cost({"0": one, "3": two}) == pytest.approx(taken, rel=1e-6)
        assert cost({"0": 24}) > cost({"0": 32})


@pytest.mark.parametrize("round_to", [1, 8])
def test_budgets_are_met_where_narrower_may_be_slower(round_to):
    """A search within a budget may not count on costs that fall with each channel."""
    graph = lp.trace(network(), IMAGE)
    one, two = Axis(0, (("0", 1),)), Axis(0, (("3", 1),))
    copied = [(replace(axis, unfilled=16),) for axis in (one, two)]
    graph.terms[TABLE] = [Term(0.001, (one, two), "3"), Term(0.04, copied[0], "0"), Term(0.02, copied[1], "3")]
    cost = CostModel(graph, TABLE)
    assert cost({"0": 24}) > cost({})
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(group.size, generator=generator) for name, group in graph.groups.items()}
        for keep in (0.9, 0.7, 0.5, 0.4):
            plan = lp.plan(graph, scores, keep=keep, metric=TABLE, round_to=round_to)
            assert cost(plan.widths) / cost.original == pytest.approx(plan.budget["achieved"])
            assert plan.budget["achieved"] <= keep


def test_predictions_are_exact_of_the_original_network(monkeypatch):
    """What no feature describes, as a kernel that is chosen for one width alone, is not spread over all predictions."""

    def fast_as_it_is(graph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
        two = widths.get("3", 64)
        return {Segment("3", 0): (1 + 0.1 * two) * (0.7 if two == 64 else 1)}

    monkeypatch.setattr(profiling, "time_segments", fast_as_it_is)
    graph = lp.trace(network(), IMAGE)
    profile(graph, samples=24)
    assert CostModel(graph, "latency").original == pytest.approx(0.7 * 7.4, rel=0.05)


def test_a_cold_start_does_not_count(monkeypatch):
    calls = []

    def cold_at_first(graph, widths: dict[str, int], runs: int) -> dict[Segment, float]:
        calls.append(widths)
        slower = 3 if len(calls) < 3 else 1
        return {segment: slower * taken for segment, taken in clock(graph, widths, runs).items()}

    monkeypatch.setattr(profiling, "time_segments", cold_at_first)
    graph = lp.trace(network(), IMAGE)
    profile(graph, samples=12)
    assert CostModel(graph, "latency").original == pytest.approx(time_of({}), rel=1e-6)


def test_the_fit_is_the_best_without_negative_coefficients():
    generator = np.random.default_rng(0)
    for _ in range(50):
        matrix, target = generator.normal(size=(12, 4)), generator.normal(size=12)
        found = profiling._non_negative_fit(matrix, target)
        slope = matrix.T @ (matrix @ found - target)  # the conditions of Karush, Kuhn and Tucker
        assert (found >= 0).all()
        assert (slope >= -1e-9).all()
        assert abs(slope @ found) < 1e-9


def outputs_of(model, widths):
    """Run a model at some widths; return the output channels of each layer."""
    names, channels = {module: name for name, module in model.named_modules()}, {}

    def watch(module, forward):
        def run(x):
            y = forward(x)
            channels[names[module]] = y.shape[1]
            return y

        return run

    with at_widths(lp.trace(model, IMAGE), widths, watch) as run:
        own = {name: value.shape for name, value in model.state_dict().items()}
        assert run().shape == (2, 4, 8, 8)
    return channels, own


def test_timing_does_not_change_the_model():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    channels, shapes_meanwhile = outputs_of(model, {"0": 5, "3": 7})
    assert (channels["0"], channels["3"]) == (5, 7)
    assert shapes_meanwhile == {name: value.shape for name, value in before.items()}
    assert model.training
    assert model[3].out_channels == 64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_timing_does_not_count():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model.register_buffer("calls", torch.zeros(()))
    graph = lp.trace(model, IMAGE)
    profile(graph, samples=2, runs=1)
    planning.measured_fraction(graph, {"0": 4}, rounds=1)
    planning.measure_latency(model, IMAGE, runs=1)
    assert model.calls == 0


def test_a_pruned_model_is_timed_at_widths_of_the_original():
    model = network()
    graph = lp.trace(model, IMAGE)
    lp.prune(model, graph.plan({"0": torch.arange(4)}))
    channels, shapes_meanwhile = outputs_of(model, {"0": 32})
    assert channels["0"] == 32
    assert model[0].weight.shape[0] == shapes_meanwhile["0.weight"][0] == 4


def test_a_profile_is_measured_once(monkeypatch, own_cache):
    monkeypatch.setattr(profiling, "time_segments", clock)
    first = lp.trace(network(), IMAGE)
    profile(first, samples=4)

    def fail(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(profiling, "time_segments", fail)
    second = lp.trace(network(), IMAGE)
    profile(second, samples=4)
    assert second.terms["latency"] == first.terms["latency"]
    with pytest.raises(AssertionError, match="measured again"):
        profile(lp.trace(network(), torch.zeros(1, 3, 12, 12)), samples=4)  # other inputs take other times
    (stored,) = (own_cache / "lightning-prune" / "latency").iterdir()
    stored.write_text(json.dumps([[1.0]])[:-3])
    monkeypatch.setattr(profiling, "time_segments", clock)
    third = lp.trace(network(), IMAGE)
    profile(third, samples=4)
    assert third.terms["latency"] == first.terms["latency"]


def machine(monkeypatch, measured) -> list[float]:
    """Put a machine of known speed in place of this one; returns what it was asked to time."""
    asked = []

    def fraction(graph, widths, rounds=5):
        asked.append(measured(time_of(dict(widths)) / time_of({})))
        return asked[-1]

    monkeypatch.setattr(profiling, "time_segments", clock)
    monkeypatch.setattr(by_time, "measured_fraction", fraction)
    monkeypatch.setattr(metrics, "measured_fraction", fraction)
    return asked


@pytest.mark.parametrize("power", [0.7, 1.0, 1.4])
def test_the_budget_is_met_in_measured_time_even_where_the_profile_is_wrong(monkeypatch, power):
    asked = machine(monkeypatch, lambda fraction: fraction**power)
    graph = lp.trace(network(), IMAGE)
    made = lp.plan(graph, lp.criteria.magnitude(graph), keep=0.6, metric="latency", round_to=1)
    assert made.budget["achieved"] == pytest.approx((time_of(made.widths) / time_of({})) ** power)
    assert 0.6 * 0.97 <= made.budget["achieved"] <= 0.6
    assert made.budget["predicted"] == pytest.approx(time_of(made.widths) / time_of({}), rel=1e-6)
    assert len(asked) <= 8


def test_what_cannot_be_reached_is_told_with_what_was_measured(monkeypatch):
    machine(monkeypatch, lambda fraction: 0.4 + 0.6 * fraction)
    graph = lp.trace(network(), IMAGE)
    least = 0.4 + 0.6 * time_of({"0": 8, "3": 8}) / time_of({})
    with pytest.raises(ValueError, match=f"keep=0.4 of the latency cannot be reached.* took {least:.3f} of the"):
        lp.plan(graph, lp.criteria.magnitude(graph), keep=0.4, metric="latency", round_to=8)


@pytest.mark.parametrize("keep", [0.25, 0.15])
def test_a_budget_is_refused_by_what_was_measured_not_by_what_the_profile_says(monkeypatch, keep):
    machine(monkeypatch, lambda fraction: fraction**1.5)
    graph = lp.trace(network(), IMAGE)
    predicted = time_of({"0": 1, "3": 1}) / time_of({})
    assert predicted > 0.25 > predicted**1.5 > 0.15
    if keep > predicted**1.5:
        check_reachable(graph, keep, "latency", round_to=1)
        assert lp.plan(graph, lp.criteria.magnitude(graph), keep, "latency", round_to=1).budget["achieved"] <= keep
    else:
        with pytest.raises(ValueError, match=f"keep={keep} of the latency .* between {predicted**1.5:.3f} and 1 can"):
            check_reachable(graph, keep, "latency", round_to=1)


def test_channels_that_save_more_time_are_pruned_first(monkeypatch):
    machine(monkeypatch, lambda fraction: fraction)
    graph = lp.trace(network(), IMAGE)
    alike = {name: torch.ones(group.size) for name, group in graph.groups.items()}
    widths = lp.plan(graph, alike, keep=0.7, metric="latency", round_to=1).widths
    assert widths["0"] / 32 < widths["3"] / 64  # a channel of "0" costs two to three times as much


def test_of_channels_that_do_harm_those_that_cost_more_are_pruned_first(monkeypatch):
    machine(monkeypatch, lambda fraction: fraction)
    graph = lp.trace(network(), IMAGE)
    harmful = {name: -torch.ones(group.size) for name, group in graph.groups.items()}
    widths = lp.plan(graph, harmful, keep=0.7, metric="latency", round_to=1).widths
    assert widths["0"] / 32 < widths["3"] / 64


def test_auto_rounding_keeps_the_highest_score(monkeypatch):
    machine(monkeypatch, lambda fraction: fraction)
    graph = lp.trace(network(), IMAGE)
    scores = lp.criteria.magnitude(graph)
    plans = {  # 32 is too coarse for this budget
        step: lp.plan(graph, scores, keep=0.6, metric="latency", round_to=step) for step in ("auto", 16, 8, 4, 1)
    }
    kept = {step: by_time.kept_score(plan, scores) for step, plan in plans.items()}
    assert kept["auto"] == max(kept.values())
    assert len(set(kept.values())) > 1
    with pytest.raises(ValueError, match="round_to must be a whole number of at least 1; got 'auto'"):
        lp.plan(graph, scores, keep=0.6, metric="flops", round_to="auto")


def test_layer_ratios_meet_a_budget_of_time(monkeypatch):
    machine(monkeypatch, lambda fraction: fraction**1.2)
    graph = lp.trace(network(), IMAGE)
    made = plan_by_layer(
        graph, {"0": 1.0, "3": 1.0}, lp.criteria.magnitude(graph), keep=0.5, metric="latency", round_to=1
    )
    assert 0.48 < made.budget["achieved"] <= 0.5
    assert math.isclose(made.widths["0"] / 32, made.widths["3"] / 64, abs_tol=0.04)


def test_real_time():
    graph = lp.trace(network(), torch.zeros(4, 3, 24, 24))
    profile(graph, samples=6, runs=1)
    assert 0 < planning.measured_fraction(graph, {"0": 2, "3": 2}, rounds=3) < math.inf
    assert 0 < CostModel(graph, "latency")({"0": 2, "3": 2}) <= CostModel(graph, "latency").original
