"""Recurrent layers: the arguments of a call that decide where channels lie, and how one is run without every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.records import Call

__all__ = ["RECURRENT", "Cell", "Recurrent", "run_one_step"]

RECURRENT: dict[Any, Any] = {
    torch.lstm: torch.ops.aten.lstm.input,
    torch.gru: torch.ops.aten.gru.input,
    torch.rnn_tanh: torch.ops.aten.rnn_tanh.input,
    torch.rnn_relu: torch.ops.aten.rnn_relu.input,
}
_GATES = {"aten.lstm": 4, "aten.gru": 3}


@dataclass(frozen=True)
class Cell:
    """The weights of one layer in one direction.

    Attributes:
        of_input: (gates * hidden, in).
        of_state: (gates * hidden, out).
        biases: (gates * hidden,) each; two or none.
        projection: (out, hidden); None where the output is the hidden state.
    """

    of_input: Tensor
    of_state: Tensor
    biases: list[Tensor]
    projection: Tensor | None

    @property
    def out_channels(self) -> int:
        """Number of channels of the output."""
        return self.of_state.shape[1]


@dataclass(frozen=True)
class Recurrent:
    """What a call of ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` or ``aten.rnn_relu`` was given.

    Attributes:
        x: (steps, batch, in), with the batch first where that is so, or (positions, in) where sequences are packed.
        states: The states before the first step, (layers * directions, batch, hidden or out) each.
        layers: The weights of each layer, by direction.
        gates: How many rows each hidden channel has.
        batch_axis: The axis of the batch in the input; None where sequences are packed.
    """

    x: Tensor
    states: list[Tensor]
    layers: list[list[Cell]]
    gates: int
    batch_axis: int | None

    @classmethod
    def of(cls, call: Call) -> "Recurrent":
        """Read the arguments of a call."""
        x, *others = call.args
        batch_axis = None
        if isinstance(others[2], list | tuple):  # the sizes of packed batches come before the states
            _, states, weights, has_biases, count, *_ = others
            bidirectional = others[-1]
        else:
            states, weights, has_biases, count, *_ = others
            bidirectional, batch_first = others[-2:]
            batch_axis = 0 if batch_first else 1
        directions = 2 if bidirectional else 1
        return cls(
            x=x,
            states=[states] if isinstance(states, Tensor) else list(states),
            layers=_layers(weights, has_biases, count, directions),
            gates=_GATES.get(call.name, 1),
            batch_axis=batch_axis,
        )


def _layers(weights: list[Tensor], has_biases: bool, count: int, directions: int) -> list[list[Cell]]:
    """Sort weights, which are given one after the other, by layer and direction."""
    given = iter(weights)
    biases = 2 if has_biases else 0
    has_projection = len(weights) > count * directions * (2 + biases)
    layers = []
    for _ in range(count):
        cells = []
        for _ in range(directions):
            of_input = next(given)
            of_state = next(given)
            own_biases = [next(given) for _ in range(biases)]
            projection = next(given) if has_projection else None
            cells.append(Cell(of_input, of_state, own_biases, projection))
        layers.append(cells)
    return layers


def run_one_step(function: Callable[..., Any], *args: Any) -> Any:
    """Run a recurrent function on the first step of tensors without data, and repeat its output for all others.

    Packed sequences, which need data, run whole.

    Args:
        function: The function.
        args: What it is given.
    """
    x, *others = args
    if not x.is_meta or x.dim() != 3:
        return function(*args)
    steps_axis = 0
    if others[-1]:
        steps_axis = 1  # the batch is first
    first = x.narrow(steps_axis, 0, 1)
    output, *states = function(first, *others)
    repeats = [1, 1, 1]
    repeats[steps_axis] = x.shape[steps_axis]
    whole = output.repeat(repeats)
    return whole, *states
