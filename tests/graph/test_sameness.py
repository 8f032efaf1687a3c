"""Tensors that are made in the shape of an activation, or expanded to it, keep no channel from being pruned."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine import assert_pruned, difference, random_plan, randomised
from torch import Tensor, nn

import lightning_prune as lp

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)
KEPT = [1, 4, 6]


class Around(nn.Module):
    """A function of eight channels, between two convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.between, self.head = nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)))


def like(x: Tensor) -> dict:
    return {"dtype": x.dtype, "device": x.device}


def noise(x: Tensor) -> Tensor:
    keep = torch.rand(x.shape[:2], device=x.device) < 2
    return x * keep.to(x.dtype).unsqueeze(-1)[..., None]


def in_rows(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.shape, **like(x))
    buffer[:, :, :3] = x[:, :, :3]
    buffer[:, :, 5].copy_(x[:, :, 4])
    return buffer


def beside(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(2, x.shape[1], 1, 8), x], 2)


FREE = {
    "zeros": lambda x: x + torch.zeros(x.shape, **like(x)),
    "zeros that name no device": lambda x: x + torch.zeros(x.shape, dtype=x.dtype),
    "full like another": lambda x: x * x.new_full(x.shape, 2.0),
    "one number a channel": lambda x: x * torch.ones(x.shape[1], **like(x))[:, None, None],
    "in place": lambda x: x * torch.empty(x.shape[1], 1, 1, **like(x)).fill_(3).add_(1),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(x.shape, **like(x))),
    "noise": noise,
    "written into by rows": in_rows,
    "rows beside": beside,
    "one channel expanded": lambda x: x * x.new_ones(2, 1, 8, 8).expand(x.shape).mul(2),
    "one channel repeated": lambda x: x * torch.arange(8.0, **like(x)).view(1, 1, 1, 8).repeat(1, x.shape[1], 1, 1),
    "circular padding": lambda x: F.pad(x, (1, 2, 1, 0), mode="circular"),
}


@pytest.mark.parametrize("case", FREE)
def test_what_is_made_in_the_shape_of_channels_holds_none(case: str):
    model = randomised(Around(FREE[case]).double()).eval()
    expected = {"stem.weight": {0: KEPT}, "stem.bias": {0: KEPT}, "head.weight": {1: KEPT}}
    assert_pruned(model, IMAGE, {"stem": KEPT}, expected)
    graph = lp.trace(model, IMAGE)
    assert graph.groups["stem"].mask_exact
    for _ in range(2):
        assert difference(model, graph, random_plan(graph), IMAGE) <= 1e-9


def marked_by_slice(x: Tensor) -> Tensor:
    mark = torch.ones(x.shape, **like(x))
    mark[:, ::2] = 2
    return x * mark


def marked_by_index(x: Tensor) -> Tensor:
    mark = torch.zeros(x.shape[1], **like(x))
    mark.index_fill_(0, torch.tensor([0], device=x.device), 3.0)
    return x * mark[:, None, None]


def marked_through_a_view(x: Tensor) -> Tensor:
    mark = torch.zeros(x.shape[1], **like(x))
    mark.view(-1, 1)[0] = 3.0
    return x * mark[:, None, None]


def into_more_channels(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 8, 8, 8, **like(x))
    buffer[:, : x.shape[1]] = x
    return buffer


UNPRUNABLE = {
    "as many as are written down": (lambda x: x + torch.zeros(8, 1, 1, **like(x)), "relies on the number"),
    "half as many, repeated": (
        lambda x: x + x.new_ones(2, x.shape[1] // 2, 8, 8).repeat(1, 2, 1, 1),
        "is combined with a tensor of fixed size",
    ),
    "numbered": (
        lambda x: x * torch.ones(x.shape[1], **like(x)).cumsum(0)[:, None, None],
        "is combined with a tensor of fixed size",
    ),
    "lower triangle": (
        lambda x: x * torch.ones(x.shape[1], 8, **like(x)).tril()[:, None],
        "is combined with a tensor of fixed size",
    ),
    "marked by slice": (marked_by_slice, "is combined with a tensor of fixed size"),
    "marked by index": (marked_by_index, "is combined with a tensor of fixed size"),
    "marked through a view": (marked_through_a_view, "is combined with a tensor of fixed size"),
    "into more channels": (into_more_channels, "relies on the number of its channels"),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_what_tells_positions_apart_does(case: str):
    between, why = UNPRUNABLE[case]
    graph = lp.trace(Around(between).double(), IMAGE)
    assert "stem" not in graph.groups
    assert why in graph.unprunable["stem"].reason


class Cast(nn.Module):
    """Uses the numbers of the largest channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.max(1).indices


def test_channels_that_are_told_apart_by_number_are_unprunable():
    graph = lp.trace(nn.Sequential(nn.Conv2d(3, 8, 1), Cast()).double(), IMAGE)
    assert "told apart by number" in graph.unprunable["0"].reason


DROPOUTS = {
    "one axis": (nn.Conv1d, nn.Dropout1d, 1),
    "two axes": (nn.Conv2d, nn.Dropout2d, 2),
    "three axes": (nn.Conv3d, nn.Dropout3d, 3),
    "alpha, by channel": (nn.Conv2d, nn.FeatureAlphaDropout, 2),
    "alpha": (nn.Conv2d, nn.AlphaDropout, 2),
}


@pytest.mark.parametrize("case", DROPOUTS)
def test_dropout_holds_no_channels_and_trains_on(case: str):
    convolution, dropout, axes = DROPOUTS[case]
    model = randomised(nn.Sequential(convolution(3, 8, 1), dropout(0.5), convolution(8, 2, 1)).double()).eval()
    x = torch.randn(2, 3, *[4] * axes, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert difference(model, graph, random_plan(graph), x) <= 1e-9
    lp.prune(model, graph.plan({"0": torch.tensor(KEPT)}))
    assert model.train()(x).shape == (2, 2, *[4] * axes)


def test_one_group_of_a_normalisation_stays_one():
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1)).double()).eval()
    kept = {0: KEPT}
    expected = {"0.weight": kept, "0.bias": kept, "1.weight": kept, "1.bias": kept, "2.weight": {1: KEPT}}
    assert_pruned(model, IMAGE, {"0": KEPT}, expected)
    graph = lp.trace(model, IMAGE)
    lp.prune(model, graph.plan({"0": torch.tensor(KEPT)}))
    assert model[1].num_groups == 1
    again = lp.trace(model, IMAGE)  # in its original shape
    assert again.groups["0"].size == 8
    assert "normalised over its channels" in again.groups["0"].not_mask_exact


def test_several_groups_of_a_normalisation_of_which_one_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)).double()
    graph = lp.trace(model, IMAGE)
    assert graph.groups["0"].mask_exact
    lp.prune(model, graph.plan({"0": torch.tensor([1])}))
    assert (model[1].num_groups, model[1].num_channels) == (1, 4)
    again = lp.trace(model, IMAGE)
    assert again.groups["0"].size == 2
    assert again.groups["0"].mask_exact
