"""Masks on small networks; over real networks, see graph/test_networks.py."""

import copy

import pytest
import torch
from engine import randomised, torchvision_model
from masked_twin import consumed, draw_pruned, plan_without, zeros_in_weights
from torch import nn

import lightning_prune as lp
from lightning_prune.surgery.masks import mask


def test_only_what_is_consumed_of_pruned_channels_becomes_zero():
    model = randomised(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    mask(graph, graph.plan({"0": torch.tensor([0, 2])}))
    expected = before | {"3.weight": before["3.weight"].clone()}
    expected["3.weight"][:, 4:8] = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["densenet121", "shufflenet_v2_x0_5"])
def test_a_mask_makes_zero_just_what_the_masked_twin_has_as_zero(name: str):
    model = torchvision_model(name)
    graph = lp.trace(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    pruned = draw_pruned(graph)
    with zeros_in_weights(model, consumed(graph, pruned)):
        expected = copy.deepcopy(model.state_dict())
    mask(graph, plan_without(graph, pruned))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_only_batch_normalisation_is_estimated_anew():
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.BatchNorm2d(2)).eval()
    model[0].running_mean.fill_(5.0)
    lp.surgery.recalibrate(model, [torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4)])
    assert model[0].running_mean.tolist() == [5.0, 5.0]
    assert model[1].num_batches_tracked == 2


def test_statistics_are_kept_where_there_are_no_batches():
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(5.0)
    with pytest.raises(ValueError, match="There are no batches to estimate the statistics"):
        lp.surgery.recalibrate(norm, [])
    assert norm.running_mean.tolist() == [5.0]
