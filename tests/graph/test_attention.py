"""Attention in every form: what heads, queries and keys, and values are, and that masked equals pruned."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_forms import (
    FORMS,
    HEADS,
    INNER,
    WIDTH_OF_HEAD,
    AnyWidth,
    Attributes,
    Fused,
    FusedScaled,
    Network,
    OfKeys,
    Rotated,
    Scaled,
    ScaledByStream,
    SingleHead,
    SplitBySize,
)
from engine import randomised
from masked_twin import draw_pruned, judge
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.attention import free
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.pruning import reshape

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


@pytest.mark.parametrize(("heads", "width"), [(8, 8), (4, 8), (8, 4), (3, 10)])
def test_whole_fractions_of_numbers_that_do_not_divide_are_no_chance(heads: int, width: int):
    """Five eighths of 8 x 8 // 8, times 8, are as many as half of the values: what was tried together only passed."""
    model = randomised(Network(OfKeys(heads, width)).double()).eval()
    graph = lp.trace(model, IMAGE)
    assert {kind: sizes for kind, sizes in kinds(graph).items() if kind != "channels"}.items() >= {
        "heads": [heads], "query-key": [width], "value": [width],
    }.items()  # fmt: skip
    several = [[name] for name in graph.groups] + [list(graph.groups)] * 3
    for names in several:
        assert judge(model, graph, draw_pruned(graph, names), IMAGE).apart <= 1e-9


def pruned(model: nn.Module, graph: ChannelGraph) -> tuple[nn.Module, PruningPlan]:
    """Return a copy that has about half of everything, and the plan."""
    kept = {name: torch.arange(group.size)[:: 2 if group.size > 2 else 1] for name, group in graph.groups.items()}
    plan = graph.plan(kept)
    smaller = copy.deepcopy(model)
    lp.prune(smaller, plan)
    return smaller, plan


@pytest.mark.parametrize("form", [FusedScaled, Scaled, ScaledByStream, SplitBySize, AnyWidth])
def test_what_was_pruned_is_stored_loaded_and_exported(form: type[nn.Module], tmp_path: Path):
    model = randomised(Network(form()).double()).eval()
    graph = lp.trace(model, IMAGE)
    smaller, plan = pruned(model, graph)
    expected = smaller(IMAGE)
    assert torch.equal(copy.deepcopy(smaller)(IMAGE), expected)
    assert torch.equal(pickle.loads(pickle.dumps(smaller))(IMAGE), expected)
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    lp.save(smaller, tmp_path / "smaller.pt")
    loaded = lp.load_pruned(Network(form()).double().eval(), tmp_path / "smaller.pt")
    assert torch.equal(loaded(IMAGE), expected)
    exported = torch.export.export(smaller, (IMAGE,)).module()
    assert torch.allclose(exported(IMAGE), expected, atol=1e-12)
    again = lp.trace(smaller, IMAGE)
    assert {name: group.slices for name, group in again.groups.items()} == {
        name: group.slices for name, group in graph.groups.items()
    }


def test_pruned_in_steps_is_pruned_at_once_and_undone_whole():
    model = randomised(Network(FusedScaled()).double()).eval()
    graph = lp.trace(model, IMAGE)
    at_once, plan = pruned(model, graph)
    in_steps = copy.deepcopy(model)
    for name in reversed(list(plan.groups)):
        lp.prune(in_steps, graph.plan({name: plan.groups[name].channels}))
    assert torch.equal(in_steps(IMAGE), at_once(IMAGE))
    assert type(in_steps.attention) is not FusedScaled
    assert isinstance(in_steps.attention, FusedScaled)
    reshape(in_steps, None)
    in_steps.load_state_dict(model.state_dict())
    assert type(in_steps.attention) is FusedScaled
    assert torch.equal(in_steps(IMAGE), model(IMAGE))


def test_attributes_follow_heads_and_widths():
    fused = Network(Attributes())
    graph = lp.trace(fused, IMAGE.float())
    smaller, _ = pruned(fused, graph)
    assert (smaller.attention.num_heads, smaller.attention.head_dim, smaller.attention.inner) == (3, 2, 6)
    assert smaller.attention.scale == fused.attention.scale
    assert type(smaller.attention) is Attributes


def test_a_stream_whose_width_is_divided_among_heads_keeps_a_channel_for_each():
    graph = lp.trace(Network(ScaledByStream()), IMAGE.float())
    assert graph.groups["embed"].least == HEADS


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "other keys and values": {"kdim": 5, "vdim": 9, "batch_first": True},
    "without biases": {"bias": False},
    "more positions": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "with weights": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "masked": {"attn_mask": torch.ones(4, 6).triu(1).bool()},
    "padded": {"key_padding_mask": torch.tensor([[False] * 5 + [True]] * 2), "need_weights": False},
    "masked for each head": {"attn_mask": torch.randn(2 * 4, 4, 6)},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_free_attention_is_that_of_torch(setting: str, call: str):
    settings, arguments = SETTINGS[setting], CALLS[call]
    attention = randomised(nn.MultiheadAttention(12, 4, **settings)).eval()
    first = (2,) if settings.get("batch_first") else ()
    last = () if first else (2,)
    query = torch.randn(*first, 4, *last, 12)
    key = torch.randn(*first, 6, *last, settings.get("kdim", 12))
    value = torch.randn(*first, 6, *last, settings.get("vdim", 12))
    expected, weights = attention(query, key, value, **arguments)
    free(attention)
    found, other_weights = attention(query, key, value, **arguments)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (weights is None) == (other_weights is None)
    assert weights is None or torch.allclose(other_weights, weights, atol=1e-5)


class Crossed(nn.Module):
    """Attends from one sequence to another."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        self.attention = nn.MultiheadAttention(12, 4, **settings)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x[:, :2], x[:, :2])[0])


@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"add_bias_kv": True}, {"bias": False}])
def test_attention_of_torch_loses_heads_and_widths(settings: dict[str, Any]):
    settings = {"batch_first": True, **settings}
    model = randomised(Crossed(**settings).double()).eval()
    graph = lp.trace(model, IMAGE)
    assert kinds(graph) == {"channels": [12], "query-key": [3], "value": [3], "heads": [4]}
    assert all(group.mask_exact for group in graph.groups.values())
    for _ in range(3):
        assert judge(model, graph, draw_pruned(graph), IMAGE).apart <= 1e-9
    smaller, _ = pruned(model, graph)
    assert list(smaller.state_dict()) == list(model.state_dict())
    assert isinstance(smaller.attention, nn.MultiheadAttention)
    assert (smaller.attention.num_heads, smaller.attention.embed_dim) == (2, 6)
    reshape(smaller, None)
    assert type(smaller.attention) is nn.MultiheadAttention


def test_an_encoder_layer_runs_pruned_by_its_fused_path():
    model = randomised(nn.TransformerEncoderLayer(12, 4, 24, batch_first=True)).eval()
    x = torch.randn(2, 5, 12)
    graph = lp.trace(model, x)
    smaller, _ = pruned(model, graph)
    with torch.no_grad():  # where torch would take its own operator
        fused = smaller(x)
    assert torch.allclose(fused, smaller(x), atol=1e-5)
