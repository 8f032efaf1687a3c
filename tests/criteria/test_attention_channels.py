"""Criteria on the channels of attention: each lies in all heads, and no layer consumes those of queries and keys."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria.expected_shares import expected_shares
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.pruning_plan import Slice

HEADS = 3


class Attention(nn.Module):
    """Three heads of four channels for queries and keys and five for values, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.head = nn.Linear(3, 8), nn.Linear(7, 2)
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.v, self.out = nn.Linear(8, 15), nn.Linear(15, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        return self.head(self.out(attended).relu()).mean(1)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, 3, generator=generator), torch.arange(8) % 2) for _ in range(2)]


@pytest.fixture
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    return lp.trace(Attention(), torch.zeros(2, 6, 3))


def at_values(graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what the layer behind attention is given, and the gradients there: (samples, tokens, heads, width)."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    handle = graph.model.out.register_forward_pre_hook(keep)
    for batch in batches:
        (loss_of(graph.model, batch) * len(batch[0])).backward()
    handle.remove()
    graph.model.zero_grad()
    inputs, gradients = torch.cat([x.detach() for x in seen]), torch.cat([x.grad for x in seen])
    return inputs.unflatten(-1, (HEADS, -1)), gradients.unflatten(-1, (HEADS, -1))


def test_a_channel_of_values_is_watched_in_all_heads(graph: ChannelGraph, batches: list) -> None:
    inputs, gradients = at_values(graph, batches)
    means = inputs.mean((0, 1, 2))
    found = lp.criteria.score(graph, "mean_activation", batches, loss_of)["v"]
    torch.testing.assert_close(found / found.norm(), means / means.norm(), check_dtype=False)
    effects = (inputs * gradients).sum((1, 2)).abs().mean(0)  # of a sample, then over samples
    found = lp.criteria.score(graph, "taylor", batches, loss_of)["v"]
    torch.testing.assert_close(found / found.norm(), effects / effects.norm(), check_dtype=False)


def crossed(graph: ChannelGraph) -> ChannelGraph:
    """Say of queries and keys that they are masked where they are produced, as no layer consumes them."""
    group = graph.groups["q"]
    marked = replace(group, in_slices=group.out_slices + group.other_slices)
    return replace(graph, groups={**graph.groups, "q": marked})


def unmarked(graph: ChannelGraph) -> ChannelGraph:
    """Say that nothing of queries and keys can be masked."""
    return replace(graph, groups={**graph.groups, "q": replace(graph.groups["q"], in_slices=())})


@pytest.mark.parametrize(
    "criterion",
    ["coherent_obs", "mean_activation", "apoz", "taylor", {"name": "taylor", "variant": "gate"}],
    ids=str,
)
def test_where_queries_are_masked_they_are_not_consumed_by_a_layer(
    criterion: str | dict[str, str], graph: ChannelGraph, batches: list
) -> None:
    found, expected = (lp.criteria.score(one, criterion, batches, loss_of) for one in (crossed(graph), unmarked(graph)))
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert torch.equal(found[name], scores)
        assert scores.isfinite().all()


def test_queries_and_keys_are_told_apart_by_what_they_give_to_products(graph: ChannelGraph) -> None:
    graph = unmarked(graph)
    graph.groups["q"] = replace(graph.groups["q"], kind="query-key")
    of_queries, of_keys = (
        layer.weight.detach().double().view(HEADS, 4, -1).square().sum(2) for layer in (graph.model.q, graph.model.k)
    )
    products = (of_queries * of_keys).sum(0)
    torch.testing.assert_close(expected_shares(graph)["q"], products / products.sum())
    graph.groups["q"] = replace(graph.groups["q"], kind="channels")
    sums = (of_queries + of_keys).sum(0)
    torch.testing.assert_close(expected_shares(graph)["q"], sums / sums.sum())
    graph.model.q.weight.data.zero_()
    graph.model.k.weight.data.zero_()
    assert expected_shares(graph)["q"].tolist() == [0.25] * 4


def with_heads(graph: ChannelGraph) -> ChannelGraph:
    """Take heads to be those of the values alone, each of which has a position of every channel of the width."""
    heads = Group(
        "v#heads",
        HEADS,
        out_slices=(Slice("v.weight", 0, 0, 5, 5),),
        in_slices=(Slice("out.weight", 1, 0, 5, 5),),
        other_slices=(Slice("v.bias", 0, 0, 5, 5),),
        kind="heads",
    )
    others = {name: group for name, group in graph.groups.items() if group.kind != "heads"}
    return replace(graph, groups={**others, "v#heads": heads})


def order_by_masks(graph: ChannelGraph) -> list[tuple[str, int]]:
    """Return the order in which channels are pruned if the norms of masked weights are taken anew after each."""
    weights = {name: value.detach().double().clone() for name, value in graph.model.named_parameters()}
    left = [(name, channel) for name, group in graph.groups.items() for channel in range(group.size)]

    def places(name: str, channel: int) -> list[tuple[Tensor, int, Tensor]]:
        slices = dict.fromkeys(graph.groups[name].slices)
        matrices = [one for one in slices if weights[one.tensor].dim() > 1]
        return [(weights[one.tensor], one.axis, one.positions(torch.tensor([channel]))) for one in matrices]

    order = []
    while left:
        norms = {
            (name, channel): sum(
                float(w.index_select(axis, at).square().sum()) for w, axis, at in places(name, channel)
            )
            for name, channel in left
        }
        by_group = {name: [norm for (other, _), norm in norms.items() if other == name] for name, _ in left}
        means = {name: sum(of_group) / len(of_group) for name, of_group in by_group.items()}
        chosen = min(left, key=lambda key: norms[key] / means[key[0]] if norms[key] > 1e-12 else 0.0)
        for weight, axis, at in places(*chosen):
            weight.index_fill_(axis, at, 0.0)
        left.remove(chosen)
        order.append(chosen)
    return order


def test_group_norms_count_once_what_heads_and_their_values_share(graph: ChannelGraph) -> None:
    graph = crossed(with_heads(graph))
    scores = lp.criteria.group_magnitude(graph)
    found = sorted(
        (float(score), name, channel) for name, values in scores.items() for channel, score in enumerate(values)
    )
    assert [(name, channel) for _, name, channel in found] == order_by_masks(graph)


class Multihead(nn.Module):
    """Two heads of four channels, of PyTorch's own attention, to itself or to something narrower."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        width = 6 if across else 8
        self.make, self.beside, self.head = nn.Linear(3, 8), nn.Linear(3, 6), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True)
        self.across = across

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x)
        other = self.beside(x[:, :4]).relu() if self.across else made
        attended, _ = self.attention(made, other, other, need_weights=False)
        return self.head(attended).mean(1)


def projected(model: Multihead, x: Tensor) -> tuple[Tensor, ...]:
    """Work out by hand what is projected, queries, keys, and what the output projection is given."""
    made = model.make(x)
    other = model.beside(x[:, :4]).relu() if model.across else made
    attention = model.attention
    biases = attention.in_proj_bias.chunk(3)
    if model.across:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)
    q, k, v = (F.linear(y, w, b) for y, w, b in zip((made, other, other), weights, biases, strict=True))
    heads = [y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(-2, -1) / 2).softmax(-1)
    return made, q, k, (weights @ heads[2]).transpose(1, 2)  # (n, tokens, heads, width)


@pytest.mark.parametrize("across", [False, True])
@torch.no_grad()
def test_what_multi_head_attention_projects_is_watched(across: bool, batches: list) -> None:
    torch.manual_seed(0)
    model = Multihead(across)
    graph = lp.trace(model, batches[0][0])
    made, q, k, attended = projected(model, torch.cat([x for x, _ in batches]))

    def shares(values: Tensor, axes: tuple[int, ...]) -> Tensor:
        return (values != 0).double().mean(axes)

    expected = {"make": shares(made, (0, 1)), "attention": shares(attended, (0, 1, 3))}
    apoz = lp.criteria.score(graph, "apoz", batches, loss_of)
    means = lp.criteria.score(graph, "mean_activation", batches, loss_of)
    kinds = {group.kind: name for name, group in graph.groups.items()}
    of_width = attended.mean((0, 1, 2))
    torch.testing.assert_close(means[kinds["value"]], of_width / of_width.norm(), check_dtype=False)
    of_heads = attended.mean((0, 1, 3))
    torch.testing.assert_close(means[kinds["heads"]], of_heads / of_heads.norm(), check_dtype=False)
    by_head = [y.unflatten(-1, (2, 4)).mean((0, 1)) for y in (q, k)]  # (heads, width)
    of_keys = torch.cat(by_head).mean(0)  # of as many heads of queries as of keys
    torch.testing.assert_close(means[kinds["query-key"]], of_keys / of_keys.norm(), check_dtype=False)
    torch.testing.assert_close(apoz["make"], expected["make"], check_dtype=False)

    kept = {name: torch.arange(group.size)[: max(1, group.size // 2)] for name, group in graph.groups.items()}
    before = {name: means[name][:1].sign() for name in graph.groups}
    lp.prune(model, graph.plan({name: kept[name] for name in (kinds["value"], kinds["query-key"])}))
    after = lp.criteria.score(graph, "mean_activation", batches, loss_of)  # of attention of unequal widths
    assert all(values.isfinite().sum() == len(graph.kept(name)) for name, values in after.items())
    assert before.keys() == after.keys()
