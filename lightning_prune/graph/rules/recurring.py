"""Operators that go through sequences step by step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.graph.recurrent import Cell, Recurrent
from lightning_prune.graph.rules.table import rule
from lightning_prune.graph.tracer import Call, Labels, Tracer

__all__: list[str] = []


@rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(tracer: Tracer, call: Call) -> None:
    """Tie the hidden channels of all layers and directions, whose states are put side by side, and so their outputs."""
    layers = Recurrent.of(call)
    followed = _Followed(tracer, layers)
    in_channels = tracer.labels(layers.x, -1)
    for directions in layers.layers:
        outputs = [followed.cell(cell, in_channels) for cell in directions]
        in_channels = _side_by_side(outputs)
    followed.tie_states()
    followed.label(call, in_channels)


def _side_by_side(outputs: list[Labels | None]) -> Labels | None:
    known = [labels for labels in outputs if labels is not None]
    if len(known) < len(outputs):
        return None
    return torch.cat(known)


@dataclass
class _Followed:
    """The channels of recurrent layers, as they are followed cell by cell.

    Attributes:
        tracer: The tracer.
        layers: What was called.
        hidden: The hidden channels of each cell.
        out: The channels of the output of each cell.
    """

    tracer: Tracer
    layers: Recurrent
    hidden: list[Labels | None] = field(default_factory=list)
    out: list[Labels | None] = field(default_factory=list)

    def cell(self, cell: Cell, in_channels: Labels | None) -> Labels | None:
        """Tie the weights of a cell to its input and to each other; returns the channels of its output."""
        tracer = self.tracer
        self._consume(cell.of_input, in_channels, "consumes an input of fixed size")
        hidden = self._hidden(cell)
        out = hidden
        if cell.projection is not None:
            # PyTorch knows a projection by fewer channels behind it.
            tracer.require_at_least(cell.out_channels + 1, hidden)
            self._consume(cell.projection, hidden, "is projected by a matrix of fixed size")
            out = tracer.labels(cell.projection, 0)
            tracer.mark_out_slice(out)
        self._consume(cell.of_state, out, "consumes a state of fixed size")
        self.hidden.append(hidden)
        self.out.append(out)
        return out

    def _consume(self, weight: Tensor, channels: Labels | None, why: str) -> None:
        in_slice = self.tracer.labels(weight, 1)
        self.tracer.tie(channels, in_slice, why)
        self.tracer.mark_consumed(weight, 1)

    def _hidden(self, cell: Cell) -> Labels | None:
        """Tie the rows that a hidden channel has, one in each gate, and return the first of each."""
        tracer = self.tracer
        rows = tracer.labels(cell.of_input, 0)
        rows_of_state = tracer.labels(cell.of_state, 0)
        tracer.mark_out_slice(rows)
        tracer.mark_out_slice(rows_of_state)
        tracer.tie(rows, rows_of_state, "has gates of fixed size")
        for bias in cell.biases:
            tracer.tie(rows, tracer.labels(bias, 0), "has a bias of fixed size")
        if rows is None:
            return None
        gates = self.layers.gates
        size = len(rows) // gates
        hidden = rows[:size]
        tracer.tie(rows, hidden.repeat(gates), "has a row in each gate")
        return hidden

    def tie_states(self) -> None:
        """Tie the channels of all states, with those of the states before the first step."""
        kinds = [self.out, self.hidden]
        for state, cells in zip(self.layers.states, kinds, strict=False):
            first, *others = cells
            for channels in others:
                self.tracer.tie(first, channels, "has states beside those of other layers")
            self.tracer.tie_to(first, state, -1, "starts from states of fixed size")

    def label(self, call: Call, out_channels: Labels | None) -> None:
        """Label the output and the states."""
        output, *states = call.outputs
        batch = self._batch()
        labels_by_axis = {output.dim() - 1: out_channels}
        if self.layers.batch_axis is not None:
            labels_by_axis[self.layers.batch_axis] = batch
        self.tracer.set_labels(output, labels_by_axis)
        kinds = [self.out, self.hidden]
        for state, cells in zip(states, kinds, strict=False):
            self.tracer.set_labels(state, {1: batch, 2: cells[0]})

    def _batch(self) -> Labels | None:
        """Return what is along the axis of the batch, and mark what is along that of the steps."""
        x = self.layers.x
        batch = None
        for axis in range(x.dim() - 1):
            labels = self.tracer.labels(x, axis)
            if axis == self.layers.batch_axis:
                batch = labels
            else:
                self.tracer.mark_unprunable(labels, "is a sequence that a recurrent layer runs over")
        return batch
