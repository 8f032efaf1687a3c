"""Masks on small networks; over real networks, see graph/test_networks.py."""

import torch
from engine import randomised
from torch import nn

import lightning_prune as lp
from lightning_prune.masking import zero_removed


def test_only_what_is_read_from_removed_channels_becomes_zero():
    model = randomised(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = lp.trace(model, torch.zeros(1, 3, 4, 4))
    zero_removed(graph, graph.plan({"0": torch.tensor([0, 2])}))
    expected = before | {"3.weight": before["3.weight"].clone()}
    expected["3.weight"][:, 4:8] = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
