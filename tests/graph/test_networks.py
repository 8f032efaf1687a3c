"""Invariant 1 and the cost model on networks that people use, over random plans."""

import copy

import pytest
import torch
from engine import counted_flops, difference, named_nowhere, random_plan, torchvision_model
from shortened import ordinary

import lightning_prune as lp
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.reachability import reachable

SIZES = {"resnet18": 40, "resnet50": 40, "mobilenet_v2": 40, "alexnet": 80, "vgg11_bn": 40}
FAMILIES = {
    "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32, "inception_v3": 75,
    "mnasnet0_5": 32, "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 64, "swin_v2_t": 64, "vit_b_32": 224,
    "lraspp_mobilenet_v3_large": 32,
}  # fmt: skip
# Seconds each, so in the long run, where the whole zoo is too.
LARGE = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "regnet_y_400mf", "resnext50_32x4d",
    "swin_t", "swin_v2_t", "vit_b_32",
)  # fmt: skip


@pytest.fixture(scope="module", params=ordinary(SIZES, "resnet18", "mobilenet_v2"))
def traced(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = torchvision_model(request.param)
    x = torch.randn(2, 3, SIZES[request.param], SIZES[request.param], dtype=torch.float64)
    return model, x, lp.trace(model, x)


def test_masked_equals_pruned(traced):
    model, x, graph = traced
    assert all(group.mask_exact for group in graph.groups.values())
    assert difference(model, graph, random_plan(graph), x) <= 1e-9


def test_only_the_classes_are_unprunable(traced):
    _, _, graph = traced
    assert [(one.channels, one.reason.split(": ")[1]) for one in graph.unprunable.values()] == [
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
    produced = {one.tensor for group in graph.groups.values() for one in group.out_slices}
    tensors = dict(pruned.named_parameters())
    assert channels(plan.widths) == sum(tensors[name].shape[0] for name in produced)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LARGE else ()) for name in FAMILIES]
)
def test_one_network_of_every_family(name: str):
    model = torchvision_model(name)
    x = torch.randn(2, 3, FAMILIES[name], FAMILIES[name], dtype=torch.float64)
    graph = lp.trace(model, x)
    assert named_nowhere(model, graph) == []
    assert difference(model, graph, random_plan(graph, exact_only=True), x) <= 1e-9
    for metric in ("flops", "channels"):
        keep = max(0.5, reachable(graph, metric))  # at small inputs most of Swin's work is unprunable
        plan = lp.plan(graph, lp.criteria.magnitude(graph), keep, metric)
        assert plan.budget["achieved"] <= keep
    lp.prune(model, plan)
    cost = CostModel(graph, "flops")
    assert cost(plan.widths) == counted_flops(model, x)
    free = CostModel(graph, "channels").original  # of each layer, as those that are unprunable are counted
    unprunable = sum(one.channels for one in graph.unprunable.values())
    assert free > 0.35 * (free + unprunable)


def test_the_stream_of_swin_is_free_although_queries_are_scaled_by_it():
    model = torchvision_model("swin_t")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert list(graph.unprunable) == ["head"]
    pruned = random_plan(graph)
    assert graph.groups["features.0.0"].size > len(pruned.groups["features.0.0"].kept)
    lp.prune(model, pruned)
    assert model(x).shape == (1, 1000)
