"""Networks of torchvision and timm against their masked twins, in float64: none broken, and mask-exact means exact.

In the ordinary run the networks that timm has for its own tests; one of every family of torchvision is in
`test_networks.py`. In the long run all of the zoo (see `benchmarks/zoo.py`), and networks of timm that a seed draws.
"""

import random
import sys
from functools import cache
from pathlib import Path

import pytest
import timm_networks
import torch
from engine import torchvision_model
from masked_twin import distance, draw_pruned, judge, outputs_of, pruned_copy
from torch import Tensor, nn

import lightning_prune as lp

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

SEED, DRAWN = 18, 60
ALONE = 3  # groups that are judged alone; all are where all together are wrong
SMALL = [
    "test_byobnet", "test_coatnet", "test_convnext", "test_convnext2", "test_efficientnet", "test_efficientnet_evos",
    "test_efficientnet_gn", "test_efficientnet_ln", "test_mambaout", "test_nfnet", "test_resnet", "test_vit",
]  # fmt: skip


@torch.no_grad()
def check(model: nn.Module, x: Tensor) -> None:
    """Prune all groups at random, all mask-exact ones, and some of these alone."""
    graph = lp.trace(model, x)
    original = outputs_of(model, (x,))
    smaller = pruned_copy(model, graph, draw_pruned(graph, list(graph.groups)))
    distance(original, outputs_of(smaller, (x,)))  # like before, but for the values
    exact = list(draw_pruned(graph))
    alone = random.Random(SEED).sample(exact, min(ALONE, len(exact)))
    for names in ([exact] if exact else []) + [[name] for name in alone]:
        found = judge(model, graph, draw_pruned(graph, names), x)
        assert found.apart <= 1e-9, names
        assert distance(found.masked, original) > 1e-9, names  # else a mistake would not be seen


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    check(*timm_networks.network(name))


@pytest.mark.long
@pytest.mark.parametrize("number", range(86))
def test_the_zoo(number: int):
    import zoo

    name = zoo.names()[number]
    model = torchvision_model(name)
    size = 224 if name.startswith(("vit", "maxvit")) else 75 if name == "inception_v3" else 64
    check(model, torch.randn(2, 3, size, size, dtype=torch.float64))


@cache
def _drawn() -> list[str]:
    """Return the first names that a seed draws, of networks that are small enough."""
    names = []
    for name in timm_networks.drawn(SEED):
        if timm_networks.is_small(name):
            names.append(name)
        if len(names) == DRAWN:
            break
    return names


@pytest.mark.long
@pytest.mark.parametrize("number", range(DRAWN))
def test_networks_of_timm(number: int):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    check(*timm_networks.network(_drawn()[number]))
