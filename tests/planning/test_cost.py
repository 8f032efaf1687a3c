"""Costs against numbers worked out by hand; against fvcore, see graph/test_networks.py."""

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.planning import CostModel, metric_named


def test_worked_out_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    graph = lp.trace(model, torch.zeros(5, 3, 6, 6))
    pixels = 5 * 4 * 4
    flops = CostModel(graph, "flops")
    # convolution, two passes of normalisation, one of pooling, linear
    assert flops.original == pixels * 9 * 3 * 4 + 2 * pixels * 4 + pixels * 4 + 5 * 4 * 2
    assert flops({"0": 3}) == pixels * 9 * 3 * 3 + 2 * pixels * 3 + pixels * 3 + 5 * 3 * 2
    params = CostModel(graph, "params")
    assert params.original == 9 * 3 * 4 + 8 + 10
    assert params({"0": 1}) == 9 * 3 + 2 + 4
    channels = CostModel(graph, "channels")
    assert (channels.original, channels({"0": 1})) == (4, 1)


def test_costs_are_quadratic_where_both_sides_shrink():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    cost = CostModel(lp.trace(model, torch.zeros(1, 3)), "flops")
    assert cost({"0": 2, "1": 3}) == 3 * 2 + 2 * 3 + 3 * 2


def test_what_lies_outside_of_the_submodule_does_not_count():
    model = nn.ModuleDict({"teacher": nn.Linear(9, 9), "student": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    graph = lp.trace(model, torch.zeros(1, 3), module="student")
    for metric, original in (("flops", 12 + 8), ("params", 16 + 10), ("channels", 4)):
        assert CostModel(graph, metric).original == original


def test_grouped_convolutions_cost_what_is_kept_of_their_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.Conv2d(8, 2, 1))
    cost = CostModel(lp.trace(model, torch.zeros(1, 3, 1, 1)), "flops")
    assert cost.original == 3 * 8 + 8 * 2 + 8 * 2
    assert cost({"0": 1}) == 3 * 2 + 2 * 2 + 2 * 2


def test_unprunable_channels_cost_but_are_not_counted_as_channels():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    graph = lp.trace(model, torch.zeros(1, 3))
    assert CostModel(graph, "channels").original == 4
    assert CostModel(graph, "flops").original == 12 + 20


def test_unknown_metric():
    graph = lp.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="metric must be one of flops, params, channels, latency; got 'flop'"):
        metric_named("flop")
    with pytest.raises(ValueError, match="is known in flops, params, channels, not in 'flop'; latency is known once"):
        CostModel(graph, "flop")
