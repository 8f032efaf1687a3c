"""Groups from labels, on the network of six labels that `lightning_prune.graph.groups` works out by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph.costs import COSTS
from lightning_prune.graph.groups import form_groups
from lightning_prune.graph.operators import OperatorTables
from lightning_prune.graph.records import Known, Record
from lightning_prune.graph.rules import RULES
from lightning_prune.graph.run import Forward
from lightning_prune.graph.slots import Slot
from lightning_prune.graph.ties import TiedPairs, components
from lightning_prune.graph.tracer import Tracer
from lightning_prune.pruning_plan import Slice

SAMPLES = torch.zeros(3, 1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))


@pytest.fixture
def forward() -> Forward:
    return Forward(network(), "", SAMPLES)


@pytest.fixture
def record(forward: Forward) -> Record:
    return forward.observe(lambda: Tracer(OperatorTables(RULES, COSTS), Known()), training=False).record


def test_six_labels(forward: Forward):
    assert forward.labelled.slots == [Slot("0.weight", 0, 1, 2), Slot("0.bias", 0, 3, 2), Slot("2.weight", 1, 5, 2)]
    assert forward.labelled.count == 7  # with FIXED


def test_what_the_forward_pass_says_of_them(record: Record):
    ties = [(tie.first.tolist(), tie.second.tolist(), tie.module) for tie in record.ties]
    assert ties == [([1, 2], [3, 4], "0"), ([1, 2], [5, 6], "2")]
    assert [labels.tolist() for labels in record.out_slices] == [[1, 2]]
    assert [labels.tolist() for labels in record.in_slices] == [[5, 6]]
    assert not record.unprunable
    assert not record.not_mask_exact


def test_components(record: Record):
    #                    label:  0  1  2  3  4  5  6
    expected_component = np.array([0, 1, 2, 1, 2, 1, 2])
    assert np.array_equal(components(7, TiedPairs.of(record.ties)), expected_component)


def test_one_group_of_two_channels(forward: Forward, record: Record):
    grouping = form_groups(forward.labelled, record)
    assert list(grouping.groups) == ["0"]
    group = grouping.groups["0"]
    assert group.size == 2
    assert group.out_slices == (Slice("0.weight", 0),)
    assert group.in_slices == (Slice("2.weight", 1),)
    assert group.other_slices == (Slice("0.bias", 0),)
    assert group.mask_exact
    assert not grouping.unprunable
    #                                 label:   0  1  2  3  4  5  6
    assert grouping.group_of.tolist() == [-1, 0, 0, 0, 0, 0, 0]
    assert grouping.tied_codes.tolist() == [1 * 7 + 3, 1 * 7 + 5, 2 * 7 + 4, 2 * 7 + 6]


def test_the_graph_says_the_same(forward: Forward, record: Record):
    graph = lp.trace(network(), SAMPLES)
    assert graph.groups == form_groups(forward.labelled, record).groups
    assert graph.groups["0"].modules == ["0", "2"]


def test_explain():
    model = nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2), nn.Linear(2, 4))
    graph = lp.trace(model, SAMPLES)
    why = "1: is normalised over its channels, fewer of which have other statistics"
    assert graph.explain("2") == "2: 4 channels cannot be pruned, because 2: is an output of the network"
    assert graph.explain("1") == (
        f"1: group '0' of 2 channels, whose pruning is not masking, because {why}; shared with 0, 2"
    )
    assert lp.trace(network(), SAMPLES).explain("0") == (
        "0: group '0' of 2 channels, whose pruning is the same as masking; shared with 2"
    )
    with pytest.raises(ValueError, match="'9' neither produces nor consumes channels; the groups are 0"):
        graph.explain("9")


class Compared(nn.Module):
    """Two layers whose outputs are compared by a loss."""

    def __init__(self, loss: Callable[..., Tensor], **settings: Any) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)
        self.loss = partial(loss, **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.one(x).sigmoid(), self.other(x).sigmoid()
        return self.head(one), self.loss(one, other).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.soft_margin_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.0)),
    ],
)
def test_channels_that_a_loss_compares_are_pruned_together(loss: Callable[..., Tensor], reduction: str):
    graph = lp.trace(Compared(loss, reduction=reduction), torch.randn(3, 8))
    (group,) = graph.groups.values()
    assert group.modules == ["one", "other", "head"]
    assert not group.mask_exact


def test_what_a_loss_compares_with_numbers_for_each_channel_is_kept():
    weighted = partial(F.binary_cross_entropy, weight=torch.rand(6))
    graph = lp.trace(Compared(weighted), torch.randn(3, 8))
    assert "is combined with a tensor of fixed size" in graph.unprunable["one"].reason
