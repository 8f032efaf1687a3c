"""Networks that cut channels at a place that is written down or computed: right in any smaller one, or unprunable."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine import difference, randomised
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import rule
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward

IMAGE = torch.zeros(2, 3, 8, 8)


class Around(nn.Module):
    """A function of channels between a convolution that makes them and one that reads them."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 2, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)))


def assert_masked_equals_pruned(model: nn.Module) -> None:
    """Prune each group alone, at either end, and all."""
    model = randomised(model).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = lp.trace(model, x)
    exact = {name: group.size for name, group in graph.groups.items() if group.mask_exact}
    for channels in (lambda size: torch.arange(size // 2, size), lambda size: torch.arange((size + 1) // 2)):
        kept = {name: channels(size) for name, size in exact.items()}
        for some in (kept, *({name: each} for name, each in kept.items())):
            assert difference(model, graph, graph.plan(some), x) <= 1e-9


def quarter(x: Tensor) -> Tensor:
    c = x.shape[1]
    a, b = x.split([c // 4, c - c // 4], 1)
    return torch.cat([a.relu(), b.sigmoid()], 1)


def smaller_half(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, :half].relu(), x[:, half:].sigmoid()], 1)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Change something in place."""

    def run(x: Tensor) -> Tensor:
        x = x.clone()
        change(x)
        return x

    return run


UNPRUNABLE = {
    "a quarter": (quarter, 8),
    "a quarter, by negative padding": (lambda x: torch.cat([F.pad(x, (0, 0) * 2 + (-(x.shape[1] // 4), 0)), x], 1), 8),
    "the smaller half": (smaller_half, 9),
    "first three negated": (changed(lambda x: x[:, :3].neg_()), 8),
    "first three by relu": (changed(lambda x: x[:, :3].relu_()), 8),
    "first three doubled": (changed(lambda x: x[:, :3].mul_(2)), 8),
    "last three doubled": (changed(lambda x: x[:, -3:].mul_(2)), 8),
    "first of equal parts of four": (changed(lambda x: x.split(4, 1)[0].neg_()), 8),
    "first of two rows of four": (changed(lambda x: x.view(2, 2, 4, 8, 8)[:, 0].neg_()), 8),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_places_that_only_fit_the_full_network_are_unprunable(case: str):
    between, channels = UNPRUNABLE[case]
    model = Around(between, channels)
    if "padding" in case:
        model.head = nn.Conv2d(14, 2, 1)
    graph = lp.trace(model, IMAGE)
    assert "stem" not in graph.groups
    assert graph.unprunable["stem"].reason.startswith("Around: relies on the number of its channels (test_cuts.py:")
    assert_masked_equals_pruned(model)


class PartialConvolution(nn.Module):
    """Convolves the first quarter of the channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        quarter = x.shape[1] // 4
        first, others = x.split([quarter, x.shape[1] - quarter], 1)
        return self.head(torch.cat([self.part(first), others], 1))


def test_partial_convolution_is_unprunable():
    graph = lp.trace(PartialConvolution(), IMAGE)
    assert "stem" not in graph.groups
    why = "PartialConvolution: relies on the number of its channels (test_cuts.py:"
    assert graph.unprunable["stem"].channels == 8
    assert graph.unprunable["stem"].reason.startswith(why)
    assert_masked_equals_pruned(PartialConvolution())


class Joined(nn.Module):
    """Puts layers side by side and takes the first, of six channels, off again; by the width of any layer."""

    def __init__(self, taken: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, width, 1) for width in (6, 6, 6, 6, 5))
        self.head = nn.Conv2d(29, 2, 1)
        self.taken = taken

    def forward(self, x: Tensor) -> Tensor:
        made = [layer(x) for layer in self.layers]
        first, others = torch.cat(made, 1).tensor_split([made[self.taken].shape[1]], 1)
        return self.head(torch.cat([first.relu(), others.sigmoid()], 1))


def test_parts_of_what_was_put_side_by_side_are_free():
    graph = lp.trace(Joined(taken=0), IMAGE)
    assert {name: group.size for name, group in graph.groups.items()} == {
        **{f"layers.{i}": 6 for i in range(4)},
        "layers.4": 5,
    }
    assert_masked_equals_pruned(Joined(taken=0))


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_place_that_is_the_width_of_another_layer_is_unprunable(taken: int):
    graph = lp.trace(Joined(taken), IMAGE)
    assert "layers.0" in graph.unprunable
    assert f"layers.{taken}" in graph.unprunable
    assert "Joined: relies on the number of its channels (test_cuts.py:" in graph.unprunable["layers.0"].reason
    assert_masked_equals_pruned(Joined(taken))


class Heads(nn.Module):
    """Splits what one layer makes into heads by the width of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.value = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        heads = self.value(self.middle(x)).reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
        return self.out(heads.sigmoid().flatten(1, 2))


def test_heads_of_the_width_of_another_layer_are_pruned_with_it():
    graph = lp.trace(Heads(), IMAGE)
    assert list(graph.groups) == ["stem", "middle"]
    assert graph.groups["stem"].size == 4, "channels at the same place in both heads"
    assert {one.tensor for one in graph.groups["stem"].out_slices} == {"stem.weight", "value.weight"}
    assert_masked_equals_pruned(Heads())


class OfOneWidth(nn.Module):
    """A reduction whose output is reshaped by the width of the stream, as attention over fewer pixels has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fewer, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 2, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels = x.shape[:2]
        fewer = self.fewer(x.relu()).reshape(batch, channels, -1).transpose(1, 2)
        return self.out(x.flatten(2).mean(2) + fewer.sigmoid().mean(1)) + self.out(fewer.mean(1))


class Shuffled(Around):
    """Reshapes channels by their own number, in another order."""

    def __init__(self) -> None:
        super().__init__(shuffled)


def shuffled(x: Tensor) -> Tensor:
    batch, channels, *pixels = x.shape
    by_pairs = x.relu().view(batch, 2, channels // 2, *pixels).transpose(1, 2)
    return by_pairs.reshape(batch, channels, *pixels)


@pytest.mark.parametrize(("model", "name", "size"), [(OfOneWidth(), "stem", 8), (Shuffled(), "stem", 4)])
def test_two_of_one_width_are_tied_and_one_by_its_own_is_not(model: nn.Module, name: str, size: int):
    graph = lp.trace(model, IMAGE)
    assert graph.groups[name].size == size
    assert_masked_equals_pruned(model)


class InTraining(Around):
    """Cuts in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.between(x) if self.training else x)


def test_what_only_training_mode_cuts_is_unprunable():
    graph = lp.trace(InTraining(quarter), IMAGE)
    assert graph.unprunable["stem"].reason.startswith("InTraining: relies on the number of its channels (test_cuts.py:")


def test_a_rule_of_ones_own_that_cuts():
    class Quarter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return quarter(x)[:, : x.shape[1] // 4]

    name = f"{Quarter.__module__}.{Quarter.__qualname__}"

    @rule(name)
    def first_quarter(tracer, call):
        labels = tracer.labels(call.args[0], 1)
        tracer.set_labels(call.output, {1: labels[: len(labels) // 4]})

    try:
        model = Around(Quarter())
        model.head = nn.Conv2d(2, 2, 1)
        assert (
            lp.trace(model, IMAGE).unprunable["stem"].reason.startswith("between: relies on the number of its channels")
        )
    finally:
        RULES.pop(name)


@pytest.mark.parametrize(("between", "most"), [(torch.relu, 2), (lambda x: x.flip(1), 2), (smaller_half, 5)])
def test_more_runs_only_where_channels_are_cut(between, most: int, monkeypatch: pytest.MonkeyPatch):
    runs = []
    run = Forward.run
    monkeypatch.setattr(Forward, "run", lambda self, *args: (runs.append(1), run(self, *args))[1])
    lp.trace(Around(between), IMAGE)
    assert len(runs) <= most


# -- groups of channels that are normalised ----------------------------------------------------------------------------


class Normalised(Around):
    """Normalises in groups of a number that is written down."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(None, channels)
        self.groups = groups
        self.scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.group_norm(self.stem(x), self.groups, self.scale, self.shift))


@pytest.mark.parametrize(("groups", "channels"), [(4, 8), (32, 64), (3, 12), (2, 8), (4, 16)])
@pytest.mark.parametrize("make", [lambda *sizes: Around(nn.GroupNorm(*sizes, affine=False), sizes[1]), Normalised])
def test_groups_whose_number_does_not_follow_are_unprunable(make, groups: int, channels: int):
    model = make(groups, channels)
    graph = lp.trace(model, IMAGE)
    assert not graph.groups
    assert re.search("(computes with|relies on) the number of its channels", graph.unprunable["stem"].reason)


@pytest.mark.parametrize(("groups", "channels"), [(4, 8), (32, 64), (3, 12)])
def test_groups_whose_number_follows_are_free(groups: int, channels: int):
    model = Around(nn.GroupNorm(groups, channels), channels)
    assert lp.trace(model, IMAGE).groups["stem"].size == groups
    assert_masked_equals_pruned(model)
