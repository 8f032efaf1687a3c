"""Attention in every form: what heads, queries and keys, and values are, and that masked equals pruned."""

import pytest
import torch
from attention_forms import FORMS, HEADS, INNER, WIDTH_OF_HEAD, Fused, Network, Rotated, SingleHead
from engine import randomised
from masked_twin import draw_pruned, judge
from torch import nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph

IMAGE = torch.randn(2, 5, 7, dtype=torch.float64)


def kinds(graph: ChannelGraph) -> dict[str, list[int]]:
    """Return the sizes of the groups of each kind."""
    found: dict[str, list[int]] = {}
    for group in graph.groups.values():
        found.setdefault(group.kind, []).append(group.size)
    return found


def only(graph: ChannelGraph, kind: str) -> list[str]:
    return [name for name, group in graph.groups.items() if group.kind == kind]


@pytest.mark.parametrize("form", FORMS)
def test_masked_equals_pruned(form: type[nn.Module]):
    model = randomised(Network(form()).double()).eval()
    graph = lp.trace(model, IMAGE)
    assert list(graph.unprunable) == ["head"]
    found = kinds(graph)
    if form is not SingleHead:
        assert found["heads"] == [HEADS if "Grouped" not in form.__name__ else HEADS // 2]
    width = INNER if form is SingleHead else WIDTH_OF_HEAD
    assert found["query-key"] == [width // 2 if form is Rotated else width]
    if not issubclass(form, Fused):  # whose queries, keys and values keep one width for all
        assert found["value"] == [width]
    assert all(group.mask_exact for group in graph.groups.values())
    for kind in found:
        assert judge(model, graph, draw_pruned(graph, only(graph, kind)), IMAGE).apart <= 1e-9
    for _ in range(2):
        assert judge(model, graph, draw_pruned(graph), IMAGE).apart <= 1e-9
