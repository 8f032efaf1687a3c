"""The plan format: positions, JSON, composition."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from damage import changed, places, refusal
from engine import random_plan
from torch import nn

import lightning_prune as lp
from lightning_prune.pruning_plan import PlannedGroup, PruningPlan, Slice


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 2)
    )


def graph_of(model: nn.Module):
    return lp.trace(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("channel_slice", "expected"),
    [
        (Slice("w", 0), [1, 3]),
        (Slice("w", 0, start=10, step=4, width=2), [14, 15, 22, 23]),
        (Slice("w", 0, table=((5, 0), (1, 7), (2, 3), (4, 6))), [1, 7, 4, 6]),
    ],
)
def test_positions(channel_slice: Slice, expected: list[int]):
    assert channel_slice.positions(torch.tensor([1, 3])).tolist() == expected


def test_plan_survives_json():
    torch.manual_seed(1)
    plan = random_plan(graph_of(network()))
    table = PlannedGroup(2, (1,), (Slice("t", 0, table=((0, 3), (1, 2))),))
    plan = PruningPlan({**plan.groups, "odd": table}, {**plan.shapes, "t": (4,)}, {"asked": 0.5})
    again = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.budget == plan.budget
    assert again.digest == plan.digest
    assert again.index()["t"][0].tolist() == [1, 2]


def test_the_digest_tells_plans_apart():
    graph = graph_of(network())
    one, other = graph.plan({"0": torch.tensor([0, 1])}), graph.plan({"0": torch.tensor([0, 2])})
    assert one.digest != other.digest


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="format version 99"):
        PruningPlan.from_json({"version": 99, "groups": {}, "shapes": {}})
    with pytest.raises(ValueError, match="The plan is damaged: its format version is None"):
        PruningPlan.from_json({})


@pytest.mark.parametrize("kept", [(), (4,), (-1, 2), (2, 1), (1, 1)])
def test_kept_channels_must_exist_and_be_ascending(kept: tuple[int, ...]):
    with pytest.raises(ValueError, match="A group of 4 channels must keep at least one"):
        PlannedGroup(4, kept, ())


def test_unknown_and_unprunable_groups_are_named():
    graph = graph_of(network())
    with pytest.raises(ValueError, match="'nothing' is no channel group of this model; the groups are 0, 2, 4"):
        graph.plan({"nothing": torch.tensor([0])})
    with pytest.raises(ValueError, match="The channels of '5' cannot be pruned: 5: is an output of the network"):
        graph.plan({"5": torch.tensor([0])})


def test_several_steps_equal_one():
    start = network()
    at_once, stepwise = network(), network()
    at_once.load_state_dict(start.state_dict())
    stepwise.load_state_dict(start.state_dict())
    graph = graph_of(start)
    first = graph.plan({"0": torch.tensor([0, 2, 3, 5, 7]), "2": torch.tensor([1, 2, 4])})
    second = graph.plan({"0": torch.tensor([2, 7]), "4": torch.tensor([0, 4])})
    third = graph.plan({"2": torch.tensor([4])})
    for plan in (first, second, third):
        lp.prune(stepwise, plan)
    lp.prune(at_once, third.after(second.after(first)))
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, stepwise.state_dict()[name])
    assert at_once[0].out_channels == stepwise[0].out_channels == 2
    assert at_once[4].in_features == stepwise[4].in_features == 16


def test_what_is_pruned_cannot_come_back():
    model = network()
    graph = graph_of(model)
    lp.prune(model, graph.plan({"0": torch.tensor([0, 1])}))
    with pytest.raises(ValueError, match=r"The plan keeps channels \[5\] of group '0', which have been pruned already"):
        lp.prune(model, graph.plan({"0": torch.tensor([0, 5])}))
    assert model[0].out_channels == 2


def test_plans_about_other_channels_of_the_same_name_are_refused():
    model = network()
    graph = graph_of(model)
    plan = graph.plan({"0": torch.tensor([0, 1])})
    lp.prune(model, plan)
    other = PruningPlan({"0": PlannedGroup(7, (0,), plan.groups["0"].slices)}, plan.shapes)
    with pytest.raises(ValueError, match="Group '0' of this plan and of the plan in force are not the same channels"):
        lp.prune(model, other)


# -- damaged and hostile plans -----------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


def content() -> dict[str, Any]:
    """Return a plan for `small`, as a file has it."""
    graph = lp.trace(small(), torch.zeros(2, 2))
    return json.loads(json.dumps(graph.plan({"0": torch.tensor([0, 2])}).to_json()))


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 7, 0.5, 1e9, 10**9, 10**30, 10**5000, math.nan, math.inf, "x", "", [], {}, [0, 0], [1, 0], [-1],
    [0.5], [True], [10**30], [None], [[0], [0]], [[0], [9]], {"x": 1}, b"x", {1: 2}, "0.weight",
)  # fmt: skip


def variants(whole: Any) -> Iterator[Any]:
    """Yield nested values with one of them replaced, left out or doubled."""
    yield from ODD
    for path in places(whole):
        if not path:
            continue
        for odd in ODD:
            yield changed(whole, path, lambda owner, key, odd=odd: owner.__setitem__(key, odd))
        yield changed(whole, path, lambda owner, key: owner.__delitem__(key))
        if isinstance(path[-1], int):
            yield changed(whole, path, lambda owner, key: owner.insert(key, owner[key]))
        else:
            yield changed(whole, path, lambda owner, key: owner.__setitem__("unknown", owner[key]))


def test_whatever_is_changed_in_a_plan_it_is_read_or_refused_in_a_sentence_before_a_tensor_is_touched() -> None:
    right, read = content(), 0
    assert PruningPlan.from_json(right).widths == {"0": 2}
    for hostile in variants(right):
        plans: list[PruningPlan] = []
        told = refusal(lambda hostile=hostile, plans=plans: plans.append(PruningPlan.from_json(hostile)))
        if told is None:
            model = small()
            before = copy.deepcopy(model.state_dict())
            told = refusal(lambda model=model, plans=plans: lp.prune(model, plans[0]))
            if told is None:
                read += 1
                continue
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert "\n" not in told
        assert len(told) < 400, told
    assert read < 60  # other channels, and what a plan says of its budget


PLACES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "fraction": (("groups", "0", "kept"), [0, 1.5], r"damaged: groups\['0'\].kept\[1\] is 1.5, not a whole number"),
    "truth": (("groups", "0", "kept"), [False, True], r"kept\[0\] is False, not a whole number"),
    "text": (("groups", "0", "kept"), "02", r"kept is '02', not a list"),
    "negative": (("groups", "0", "kept"), [-1, 2], r"A group of 4 channels must keep .* got \[-1, 2\]"),
    "beyond": (("groups", "0", "kept"), [0, 4], r"A group of 4 channels must keep .* got \[0, 4\]"),
    "huge": (("groups", "0", "kept"), [0, 2**63], r"kept\[1\] is a number of 64 bits, beyond all that can be counted"),
    "size": (("groups", "0", "size"), 5, r"channels of group '0' do not fit along axis 0 of '0.weight'.* shape \(4, 2"),
    "huge size": (("groups", "0", "size"), 2**50, r"a group cannot have \d+ channels"),
    "negative axis": (("groups", "0", "slices", 0, 1), -1, r"axis of a slice of '0.weight' cannot be"),
    "other axis": (("groups", "0", "slices", 0, 1), 2, r"do not fit along axis 2 of '0.weight'"),
    "shifted": (("groups", "0", "slices", 0, 2), 1, r"do not fit along axis 0 of '0.weight'"),
    "no step": (("groups", "0", "slices", 0, 3), 0, r"step of a slice of '0.weight' cannot be"),
    "wide": (("groups", "0", "slices", 0, 4), 2, r"do not fit along axis 0 of '0.weight'"),
    "table": (("groups", "0", "slices", 0), ["0.weight", 0, 0, 1, 1, [[0], [1], [2], [2]]], "the table of a slice"),
    "short table": (("groups", "0", "slices", 0), ["0.weight", 0, 0, 1, 1, [[0], [1]]], "do not fit along axis 0"),
    "tensor": (("groups", "0", "slices", 0, 0), "0.nothing", r"shape of '0.nothing' in it is None"),
    "no shapes": (("shapes",), {}, r"the shape of '\S+' in it is None"),
    "large shape": (("shapes", "0.weight"), [2**40, 2], r"the shape of '0.weight' in it is \[1099511627776, 2\]"),
    "version": (("version",), True, "its format version is True"),
    "budget": (("budget",), "half", "budget is 'half', not a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_damaged_plans_say_what_is_wrong(kind: str) -> None:
    path, value, message = PLACES[kind]
    hostile = changed(content(), path, lambda owner, key: owner.__setitem__(key, value))
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_json(hostile)


def test_two_groups_in_one_place_are_refused() -> None:
    hostile = content()
    hostile["groups"]["again"] = hostile["groups"]["0"]
    with pytest.raises(ValueError, match=r"the channels of group 'again' do not fit along axis 0 of '0.weight'"):
        PruningPlan.from_json(hostile)


@pytest.mark.parametrize(
    ("kept", "told"), [((0, 1.0), r"\[0, 1.0\]"), ((True,), r"\[True\]"), ("01", "'01'"), ((2**70,), r"\[1180\d+\]")]
)
def test_plans_made_in_python_are_checked_alike(kept: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"A group of 4 channels must keep at least one of them, .* got {told}"):
        PlannedGroup(4, kept, ())


def test_a_plan_of_another_network_touches_nothing() -> None:
    plan, model = PruningPlan.from_json(content()), nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"another architecture: '0.weight' has shape \(5, 2\).* expects \(4, 2\)"):
        lp.prune(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
