"""Steps: a method that runs a network in another way than forward is traced with it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.graph import trace
from lightning_prune.graph.entry import Step

BATCH = torch.randn(2, 8), torch.tensor([1, 2])


class Net(nn.Module):
    """A network with dropout and statistics, and a step that runs it in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 12))
        self.head = nn.Linear(12, 4)
        self.extra = nn.Linear(16, 5)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inner = self.body[:3](batch[0])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        loss.item()
        return loss + self.extra(inner).mean()


def traced(model: nn.Module, *names: str, batch: Any = BATCH) -> Any:
    return trace(model, batch[0], steps=[Step(name, (batch, 0), training=True) for name in names])


def described(graph: Any) -> Any:
    slices = {name: [(s.tensor, s.axis) for s in group.slices] for name, group in graph.groups.items()}
    return slices, graph.unprunable, graph.terms, [group.mask_exact for group in graph.groups.values()]


def test_what_a_step_consumes_is_pruned_along_and_costs_are_those_of_forward() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    graph, plain = traced(model, "training_step"), traced(model)
    assert ("extra.weight", 1) in described(graph)[0]["body.0"]
    assert graph.terms["flops"] == plain.terms["flops"]
    assert (
        graph.unprunable["extra"].reason == "extra: is not run by forward, so that pruning it would save nothing there"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("remembers", [True, False])
def test_what_forward_returned_is_not_run_again_unless_it_may_differ(remembers: bool) -> None:
    ran = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            ran.append(self.training)
            if not remembers:
                self.last = x  # what is kept may be looked at later
            return super().forward(x)

    graph = traced(Counted(), "training_step")
    calls = len(ran)
    ran.clear()
    traced(Counted())
    # The groups have more slices with the step, and are tried out once more; the step itself runs in full and smaller.
    assert calls == len(ran) + 1 + (0 if remembers else 2)
    assert described(graph) == described(traced(Net(), "training_step"))


class Looks(Net):
    """Its step decides by a value, and fails without data."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss > -1 and batch[1].tolist() else loss


def test_a_step_that_needs_values_keeps_no_channel_from_being_pruned() -> None:
    assert described(traced(Looks(), "training_step"))[:2] == described(traced(Net(), "training_step"))[:2]


class Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise RuntimeError("no such thing")


def test_a_step_that_fails_is_told_and_the_rest_traced() -> None:
    graph = traced(Fails(), "training_step")
    assert graph.untraced == {"training_step": "RuntimeError: no such thing"}
    assert described(graph)[0] == described(traced(Net()))[0]


class Written(Net):
    """Its step is written for the number of channels; a module of its own relies on another."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inner = self.body[:3](batch[0])
        return (inner * torch.ones(16)).sum() + self(batch[0]).sum()


def test_channels_that_a_step_is_written_for_have_the_line_as_reason() -> None:
    graph = traced(Written(), "training_step")
    assert set(graph.groups) == {"body.4"}
    assert graph.unprunable["body.0"].reason.startswith("training_step: ")
    assert "test_steps.py" in graph.unprunable["body.0"].reason


def test_a_step_of_the_whole_counts_for_a_part() -> None:
    model = Net()
    step = Step("training_step", (BATCH, 0), training=True)
    graph = trace(model, BATCH[0], module="body", steps=[step])
    assert "body.0" not in graph.groups  # consumed by what is not in the part
    assert graph.unprunable["body.0"].reason.startswith("extra: ")


def test_a_model_without_forward_is_entered_by_a_step() -> None:
    class NoForward(Net):
        forward = nn.Module.forward

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1])

    graph = trace(NoForward(), Step("validation_step", (BATCH, 0), training=False))
    assert set(graph.groups) == {"body.0", "body.4"}
    assert graph.unprunable["head"].channels == 4
