"""The plan format: positions, JSON, composition."""

import json

import pytest
import torch
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
    with pytest.raises(ValueError, match="format version None"):
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
    other = PruningPlan({"0": PlannedGroup(9, (0,), plan.groups["0"].slices)}, plan.shapes)
    with pytest.raises(ValueError, match="Group '0' of this plan and of the plan in force are not the same channels"):
        lp.prune(model, other)
