"""Recurrent layers: which rows and columns are pruned, mask-exact in both modes, with sizes in step, at any length."""

import copy
from typing import Any

import pytest
import torch
from engine import assert_pruned, random_plan, randomised
from masked_twin import draw_pruned, judge
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_prune as lp
from lightning_prune.surgery.pruning import reshape

STEPS = torch.zeros(7, 2, 5)


class Recurrent(nn.Module):
    """A linear layer, a recurrent one, and one that reads its outputs."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(5, 6), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(x).relu())[0])


class LastState(Recurrent):
    """Reads the last hidden state of the last layer, and the cell state if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        states = self.layer(self.first(x).relu())[1]
        return sum(self.head(state[-1]) for state in (states if isinstance(states, tuple) else [states]))


class Packed(Recurrent):
    """Runs over sequences of several lengths."""

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.first(x), torch.tensor([7, 4]))
        return self.head(pad_packed_sequence(self.layer(packed)[0])[0])


class Cells(Recurrent):
    """Goes from step to step by itself."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[1], self.layer.hidden_size)
        state: Any = (zeros, zeros) if isinstance(self.layer, nn.LSTMCell) else zeros
        for step in self.first(x).relu():
            state = self.layer(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Given(Recurrent):
    """Starts from a state of its own."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__(layer, width)
        self.start = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(x), self.start.expand(-1, x.shape[1], -1).contiguous())[0])


NETWORKS: dict[str, tuple[nn.Module, Tensor]] = {
    "lstm": (Recurrent(nn.LSTM(6, 8), 8), STEPS),
    "gru, batch first": (Recurrent(nn.GRU(6, 8, batch_first=True), 8), STEPS),
    "elman, two layers": (Recurrent(nn.RNN(6, 8, 2), 8), STEPS),
    "elman, rectified, without biases": (Recurrent(nn.RNN(6, 8, nonlinearity="relu", bias=False), 8), STEPS),
    "lstm, two layers both ways": (Recurrent(nn.LSTM(6, 4, 2, bidirectional=True), 8), STEPS),
    "gru, both ways, batch first": (Recurrent(nn.GRU(6, 4, 2, bidirectional=True, batch_first=True), 8), STEPS),
    "lstm, projected": (Recurrent(nn.LSTM(6, 8, 2, proj_size=4), 4), STEPS),
    "lstm, projected, both ways": (Recurrent(nn.LSTM(6, 7, proj_size=3, bidirectional=True, bias=False), 6), STEPS),
    "one sequence": (Recurrent(nn.LSTM(6, 8), 8), STEPS[:, 0]),
    "last states of an lstm": (LastState(nn.LSTM(6, 8, 2), 8), STEPS),
    "last state of a gru": (LastState(nn.GRU(6, 8, 2, batch_first=True), 8), STEPS),
    "packed lstm": (Packed(nn.LSTM(6, 8, 2), 8), STEPS),
    "packed gru, both ways": (Packed(nn.GRU(6, 4, bidirectional=True), 8), STEPS),
    "cells of an lstm": (Cells(nn.LSTMCell(6, 8), 8), STEPS),
    "cells of a gru": (Cells(nn.GRUCell(6, 8), 8), STEPS),
    "elman cells": (Cells(nn.RNNCell(6, 8), 8), STEPS),
    "a state that is learned": (Given(nn.GRU(6, 8), 8), STEPS),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NETWORKS)
@torch.no_grad()
def test_mask_exact(case: str, training: bool):
    model, inputs = NETWORKS[case]
    torch.manual_seed(0)
    model = randomised(copy.deepcopy(model).double()).train(training)
    x = torch.randn(inputs.shape, dtype=torch.float64)
    graph = lp.trace(model, x)
    assert list(graph.unprunable) == ["head"]
    assert {"first", "layer"} <= set(graph.groups)
    assert all(group.mask_exact for group in graph.groups.values())
    for names in ([name] for name in graph.groups):
        assert judge(model, graph, draw_pruned(graph, names), x).apart <= 1e-9, names
    assert judge(model, graph, draw_pruned(graph), x).apart <= 1e-9


def rows(gates: int, kept: list[int], width: int) -> list[int]:
    return [gate * width + channel for gate in range(gates) for channel in kept]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_a_hidden_channel_has_a_row_in_each_gate_of_every_layer(kind: Any, gates: int):
    kept, of_gates = [0, 3], rows(gates, [0, 3], 4)
    expected: dict[str, dict[int, list[int]]] = {
        "first.weight": {0: [1, 5]},
        "first.bias": {0: [1, 5]},
        "head.weight": {1: [0, 3, 4, 7]},
    }
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        read = [1, 5] if "0" in suffix else [0, 3, 4, 7]
        expected[f"layer.weight_ih_{suffix}"] = {0: of_gates, 1: read}
        expected[f"layer.weight_hh_{suffix}"] = {0: of_gates, 1: kept}
        expected[f"layer.bias_ih_{suffix}"] = expected[f"layer.bias_hh_{suffix}"] = {0: of_gates}
    model = randomised(Recurrent(kind(6, 4, 2, bidirectional=True), 8))
    assert_pruned(model, STEPS, {"first": [1, 5], "layer": kept}, expected)


def test_what_a_projection_consumes_and_produces():
    hidden, projected = [0, 1, 2, 4, 6], [1, 3]
    of_gates = rows(4, hidden, 8)
    expected: dict[str, dict[int, list[int]]] = {"head.weight": {1: projected}}
    for layer in range(2):
        expected[f"layer.weight_ih_l{layer}"] = {0: of_gates} | ({1: projected} if layer else {})
        expected[f"layer.weight_hh_l{layer}"] = {0: of_gates, 1: projected}
        expected[f"layer.weight_hr_l{layer}"] = {0: projected, 1: hidden}
        expected[f"layer.bias_ih_l{layer}"] = expected[f"layer.bias_hh_l{layer}"] = {0: of_gates}
    model = randomised(Recurrent(nn.LSTM(6, 8, 2, proj_size=4), 4))
    group, other = (name for name in lp.trace(model, STEPS).groups if name != "first")
    assert_pruned(model, STEPS, {group: hidden, other: projected}, expected)


def test_more_hidden_channels_are_kept_than_there_are_behind_a_projection():
    """PyTorch tells whether there is a projection by the states being of different widths."""
    model = Recurrent(nn.LSTM(6, 8, proj_size=4), 4)
    graph = lp.trace(model, STEPS)
    hidden = next(group for group in graph.groups.values() if group.size == 8)
    assert hidden.least == 5
    with pytest.raises(ValueError, match="'layer' has to keep 5 channels at least, not 4"):
        graph.plan({hidden.name: torch.arange(4)})
    smallest = lp.plan(graph, lp.criteria.magnitude(graph), 0.6, "channels", round_to=1)
    lp.prune(model, smallest)
    model(STEPS)


def test_sizes_are_in_step_and_training_goes_on():
    model = Recurrent(nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4), 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(STEPS).sum().backward()
    optimizer.step()
    plan = random_plan(lp.trace(model, STEPS))
    lp.prune(model, plan, [optimizer])
    layer = model.layer
    assert (layer.input_size, layer.hidden_size) == (model.first.out_features, layer.weight_hh_l1.shape[0] // 4)
    assert layer.proj_size * 2 == model.head.in_features
    model(STEPS).sum().backward()
    optimizer.step()
    again = Recurrent(nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4), 8)
    reshape(again, plan)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(STEPS), model(STEPS))


def test_a_state_of_fixed_size_makes_unprunable_what_starts_from_it():
    class FromInput(Recurrent):
        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            return self.head(self.layer(self.first(x), start)[0])

    graph = lp.trace(FromInput(nn.GRU(6, 8), 8), (STEPS, torch.zeros(1, 2, 8)))
    assert list(graph.groups) == ["first"]
    assert graph.unprunable["layer"].reason == "layer: starts from states of fixed size"


def test_channels_along_the_steps_are_unprunable_and_those_along_the_batch_are_not():
    class Across(nn.Module):
        def __init__(self, axis: int) -> None:
            super().__init__()
            self.axis = axis
            self.first, self.layer, self.head = nn.Linear(5, 6), nn.GRU(1, 4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            channels = self.first(x).relu().t() if self.axis == 0 else self.first(x).relu()
            states = self.layer(channels.unsqueeze(-1))[0].sum(-1)
            return self.head(states.t() if self.axis == 0 else states)

    steps = lp.trace(Across(0), torch.zeros(3, 5))
    assert steps.unprunable["first"].reason == "layer: is a sequence that a recurrent layer runs over"
    model = randomised(Across(1)).double()
    batch = lp.trace(model, torch.zeros(3, 5, dtype=torch.float64))
    assert batch.groups["first"].mask_exact
    with torch.no_grad():
        x = torch.randn(3, 5, dtype=torch.float64)
        assert judge(model, batch, {"first": [1, 4]}, x).apart <= 1e-9


def test_the_length_of_sequences_does_not_count():
    """What a trace does is the same for any number of steps; a thousand would take minutes one by one."""
    graph = lp.trace(Recurrent(nn.LSTM(6, 8, 2), 8), torch.zeros(3000, 1, 5))
    assert set(graph.groups) == {"first", "layer"}
