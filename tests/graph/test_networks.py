"""Invariant 1 and the cost model on networks that people use, over random plans."""

import copy

import pytest
import torch
from engine import counted_flops, difference, random_plan, torchvision_model

import lightning_prune as lp
from lightning_prune.budget import CostModel

SIZES = {"resnet18": 40, "resnet50": 40, "mobilenet_v2": 40, "alexnet": 80, "vgg11_bn": 40}


@pytest.fixture(scope="module", params=SIZES)
def traced(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = torchvision_model(request.param)
    x = torch.randn(2, 3, SIZES[request.param], SIZES[request.param], dtype=torch.float64)
    return model, x, lp.trace(model, x)


def test_masked_equals_removed(traced):
    model, x, graph = traced
    assert not any(group.inexact for group in graph.groups.values())
    assert difference(model, graph, random_plan(graph), x) <= 1e-9


def test_only_the_classes_are_held(traced):
    _, _, graph = traced
    assert [(held.channels, held.reason.split(": ")[1]) for held in graph.held.values()] == [
        (1000, "is an output of the network")
    ]


def test_costs_are_those_of_the_pruned_network(traced):
    model, x, graph = traced
    flops, params, channels = (CostModel(graph, metric) for metric in ("flops", "params", "channels"))
    assert flops.original == counted_flops(model, x)
    assert params.original == sum(p.numel() for p in model.parameters())
    pruned = copy.deepcopy(model)
    plan = random_plan(graph)
    lp.prune(pruned, plan)
    assert flops(plan.widths) == counted_flops(pruned, x)
    assert params(plan.widths) == sum(p.numel() for p in pruned.parameters())
    produced = {part.tensor for group in graph.groups.values() for part in group.producers}
    tensors = dict(pruned.named_parameters())
    assert channels(plan.widths) == sum(tensors[name].shape[0] for name in produced)
