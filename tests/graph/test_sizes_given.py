"""Code that splits an axis by sizes of its own, or checks a width: it is given those that fit, or its channels stay."""

from pathlib import Path

import pytest
import torch
from engine import difference, random_plan, randomised
from torch import Tensor, nn

import lightning_prune as lp


class Modulating(nn.Module):
    """Splits by the width of the stream, which the layers behind need not have, and a number of gates."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.gates = 2
        self.into, self.context = nn.Conv2d(dim, 2 * dim + self.gates, 1), nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[1]
        q, context, gates = torch.split(self.into(x), (dim, dim, self.gates), 1)
        return self.out(q * self.context(self.depthwise(context) * gates[:, :1] + context * gates[:, 1:]))


class Gated(nn.Module):
    """Splits by a tuple that it was made with; the first piece goes with both of the others."""

    def __init__(self, dim: int = 8, hidden: int = 20, convolved: int = 6) -> None:
        super().__init__()
        self.sizes = (hidden, hidden - convolved, convolved)
        self.into, self.out = nn.Conv2d(dim, 2 * hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.depthwise = nn.Conv2d(convolved, convolved, 3, padding=1, groups=convolved)

    def forward(self, x: Tensor) -> Tensor:
        gate, others, convolved = torch.split(self.into(x), self.sizes, dim=1)
        return self.out(gate.relu() * torch.cat((others, self.depthwise(convolved)), 1))


class Partial(nn.Module):
    """Splits its input by a number and what that leaves of another, and again by numbers in code."""

    def __init__(self, dim: int = 8, part: int = 3) -> None:
        super().__init__()
        self.dim, self.part = dim, part
        self.first, self.second = nn.Conv2d(part, 6 + 7, 1), nn.Conv2d(7, dim, 1)
        self.out = nn.Conv2d(6 + dim - part, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        some, others = x.split([self.part, self.dim - self.part], dim=1)
        one, other = self.first(some).split([6, 7], 1)
        return self.out(torch.cat([others, one.relu()], 1)) + self.second(other.sigmoid())


class Careful(nn.Module):
    """Refuses what has not as many channels as it was made for."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.channels = self.hidden = dim
        self.into, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise ValueError("other channels")
        x = self.into(x).relu()
        assert self.hidden == x.size(1)
        return self.out(x)


class Halves(nn.Module):
    """Gives each half of its input to a layer of its own; halves by a number."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.dim = dim
        self.one, self.other = nn.Conv2d(dim // 2, dim, 1), nn.Conv2d(dim // 2, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, self.dim // 2, 1)
        return self.one(first) + self.other(second)


class Cascade(nn.Module):
    """Splits what several layers make, each by the same sizes, at one line."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(dim, 4 + 6, 1) for _ in range(2))
        self.out = nn.ModuleList(nn.Conv2d(10, dim, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, out in zip(self.layers, self.out, strict=True):
            one, other = layer(x).split([4, 6], 1)
            x = x + out(torch.cat([one.relu(), other.sigmoid()], 1))
        return x


class Apart(Cascade):
    """Has a layer of its own behind each of the pieces."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.others = nn.ModuleList(nn.Conv2d(6, dim, 1) for _ in range(2))
        self.out = nn.ModuleList(nn.Conv2d(4, dim, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 1):
            one, other = self.layers[number](x).split([4, 6], 1)
            x = x + self.out[number](one.relu()) + self.others[number](other.sigmoid())
        return x


class HeadByHead(nn.Module):
    """Attends head by head as EfficientViT does: each is given a chunk of the input, all have the same widths."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.key_dim, self.val_dim = 3, dim // heads
        self.qkvs = nn.ModuleList(nn.Conv2d(dim // heads, 6 + self.val_dim, 1) for _ in range(heads))
        self.depthwise = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, groups=3) for _ in range(heads))
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        given, made = x.chunk(len(self.qkvs), dim=1), []
        y = given[0]
        for head, (qkv, depthwise) in enumerate(zip(self.qkvs, self.depthwise, strict=True)):
            y = qkv(y + given[head] if head else y).view(batch, -1, height, width)
            q, k, v = y.split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = depthwise(q).flatten(2), k.flatten(2), v.flatten(2)
            y = (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).view(batch, self.val_dim, height, width)
            made.append(y)
        return self.out(torch.cat(made, 1).relu())


class Network(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), kind(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).relu()))


FREE = {  # the sizes of the groups in the block of each
    Modulating: [8, 8, 8],
    Gated: [14, 6, 8],
    Partial: [6, 7, 8],
    Careful: [8, 8],
    Halves: [8],
    Apart: [4, 6],
    HeadByHead: [3, 8],
}


def network(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomised(Network(kind).double()).eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("kind", [*FREE, Cascade])
def test_what_is_free_is_pruned_as_it_is_masked(kind: type[nn.Module]) -> None:
    model, x = network(kind)
    graph = lp.trace(model, x)
    for seed in range(6):
        torch.manual_seed(seed)
        assert difference(model, graph, random_plan(graph), x) <= 1e-9
    for name, group in graph.groups.items():
        assert difference(model, graph, graph.plan({name: torch.arange(group.size)[group.size // 2 :]}), x) <= 1e-9


@pytest.mark.parametrize("kind", FREE)
def test_sizes_that_code_gives_hold_no_channels(kind: type[nn.Module]) -> None:
    model, x = network(kind)
    graph = lp.trace(model, x)
    assert [group.size for name, group in graph.groups.items() if name.startswith("block.")] == FREE[kind]


def test_channels_at_equal_places_of_halves_go_together() -> None:
    model, x = network(Halves)
    graph = lp.trace(model, x)
    assert {name: group.size for name, group in graph.groups.items()} == {"stem": 4, "block.one": 8}


def test_layers_that_are_split_by_one_number_go_together() -> None:
    model, x = network(HeadByHead)
    graph = lp.trace(model, x)
    [of_keys] = [group for group in graph.groups.values() if group.size == 3]
    produced = {one.tensor for one in of_keys.out_slices if one.tensor.endswith("weight")}
    assert {f"block.qkvs.{head}.weight" for head in (0, 1)} <= produced
    plan = graph.plan({of_keys.name: torch.tensor([0, 2])})
    lp.prune(model, plan)
    assert model.block.key_dim == 2
    assert [layer.out_channels for layer in model.block.qkvs] == [4 + 4, 4 + 4]


def test_places_that_could_be_mistaken_for_each_other_hold_their_channels() -> None:
    model, x = network(Cascade)
    graph = lp.trace(model, x)
    assert list(graph.groups) == ["stem"]
    for layer in (0, 1):
        assert graph.unprunable[f"block.layers.{layer}"].reason.startswith(
            "block: relies on the number of its channels"
        )


@pytest.mark.parametrize("kind", FREE)
def test_it_is_pruned_again_and_loaded_onto_its_class(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = network(kind)
    graph = lp.trace(model, x)
    torch.manual_seed(0)
    plan = random_plan(graph)
    for part in (plan, graph.plan({name: planned.channels[:1] for name, planned in plan.groups.items()})):
        lp.prune(model, part)
        expected = model(x)
        lp.save(model, tmp_path / "pruned.pt")
        loaded = lp.load(Network(kind).double(), tmp_path / "pruned.pt").eval()
        assert torch.equal(loaded(x), expected)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), expected)
