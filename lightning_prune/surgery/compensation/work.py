"""What a compensation works with, and what it asks about the layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import Index, PruningPlan
from lightning_prune.surgery.compensation.inputs import Block, wide_blocks
from lightning_prune.surgery.compensation.lockstep import Meeting
from lightning_prune.surgery.compensation.operators import Linear
from lightning_prune.surgery.compensation.survey import Survey
from lightning_prune.surgery.compensation_report import CompensationReport

__all__ = ["Turn", "Work"]


@dataclass(frozen=True)
class Turn:
    """Channels that a layer is to return in place of some that are kept, each mixed of several.

    Attributes:
        rows: (n,) int64, those that they are mixed of, before the prune.
        places: (kept,) int64, where they lie among those that are kept.
        mix: (n, kept) float64, how much of each there is in each.
    """

    rows: Tensor
    places: Tensor
    mix: Tensor

    def put(self, kept: Tensor, every: Tensor, axis: int) -> None:
        """Put the mixed channels where they lie.

        Args:
            kept: The channels that are kept, along an axis.
            every: Those before the prune, along the same.
            axis: The axis.
        """
        channels = every.index_select(axis, self.rows)
        shares = self.mix.to(channels.dtype)
        mixed = channels.movedim(axis, -1) @ shares
        kept.index_copy_(axis, self.places, mixed.movedim(-1, axis))


@dataclass
class Work:
    """What a compensation works with.

    Attributes:
        model: The network before the prune.
        plan: The channels to keep, about the original model.
        kept: The positions to keep of its tensors as they are now, by name and axis.
        tensors: The tensors of the pruned network, by name, which may be written to.
        survey: Which layers run.
        report: What has been done.
        uncompensated: Weights as they would be without compensation, by name, where they have been folded.
        changed: Names of the tensors that were written to.
        drifts: (channels,) mean of what a layer makes up for in the stream that it is added to, at its output, by the
            name of the running mean behind it.
        turns: What the layers of queries and keys are to return, by the names of their weights and biases.
    """

    model: nn.Module
    plan: PruningPlan
    kept: Index
    tensors: dict[str, Tensor]
    survey: Survey
    report: CompensationReport
    uncompensated: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    drifts: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = named_tensors(self.model)
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor of the pruned network other values."""
        tensor.data.copy_(values)
        self.changed.add(self._names[id(tensor)])

    def turn(self, name: str, turn: Turn) -> None:
        """Give channels that a weight or bias makes, and that are kept, other values: those of several, mixed.

        Args:
            name: Its name.
            turn: The channels.
        """
        self.turns.setdefault(name, []).append(turn)
        tensor = self.tensors[name]
        every = self._own[name].detach()
        for axis in self.kept[name]:
            if axis != 0:
                every = every.index_select(axis, self.kept_along(name, axis))
        values = tensor.detach().clone()
        turn.put(values, every, 0)
        self.write(tensor, values)

    def is_kept(self, name: str, rows: Sequence[int]) -> Tensor:
        """Tell which rows of a weight are kept: (n,) bool."""
        kept = self.kept_along(name, 0)
        every = torch.tensor(rows, device=kept.device)
        return torch.isin(every, kept)

    def bias_taking_means(self, name: str) -> Tensor | None:
        """Return the bias that goes with a weight, unless normalisation behind takes up the means."""
        if name in self.survey.normalised or name not in self.survey.bias_of:
            return None
        return self.tensors[self.survey.bias_of[name]]

    def takes_up_means(self, name: str) -> bool:
        """Tell whether something behind a weight takes up a constant: a bias, or normalisation."""
        return name in self.survey.normalised or name in self.survey.bias_of

    def consumes_pruned(self, name: str) -> bool:
        """Tell whether channels that a weight sums over are pruned."""
        axis = self.survey.in_axis.get(name)
        return axis is not None and axis in self.kept.get(name, {})

    def kept_along(self, name: str, axis: int) -> Tensor:
        """Return the positions that are kept along an axis of a tensor: (n,) int64."""
        kept = self.kept.get(name, {}).get(axis)
        tensor = self._own[name]
        every = torch.arange(tensor.shape[axis]) if kept is None else kept
        return every.to(tensor.device)

    def kept_inputs(self, norm: str, x: Tensor) -> Tensor:
        """Return the kept channels of what is normalised: (samples, kept channels, *spatial)."""
        if norm not in self.kept:
            return x
        return x.index_select(1, self.kept_along(norm, 0))

    def kept_outputs(self, name: str, meeting: Meeting, outputs: Tensor) -> Tensor:
        """Return the kept channels of what a layer returned before the prune.

        Args:
            name: Name of its weight.
            meeting: A call of it.
            outputs: (n, out_channels, ...) outputs, or what else has these channels.
        """
        layer = meeting.whole
        assert isinstance(layer, Linear)
        axis = 1 if layer.transposed and layer.groups == 1 else 0
        if axis not in self.kept.get(name, {}):
            return outputs
        kept = self.kept_along(name, axis)
        if layer.transposed and layer.groups > 1:  # whole convolution groups are kept
            inputs = len(layer.weight)
            inner = inputs // layer.groups
            kept_groups = kept[::inner] // inner
            by_group = outputs.unflatten(1, (layer.groups, -1))
            by_group = by_group.index_select(1, kept_groups)
            return by_group.flatten(1, 2)
        outputs_kept = outputs.index_select(1, kept)
        return self._turned(name, outputs_kept, outputs, 1)

    def with_kept_outputs(self, name: str) -> Tensor:
        """Return a weight before the prune, less the outputs that are pruned."""
        weight = self._own[name].detach()
        in_axis = self.survey.in_axis[name]
        for axis in self.kept.get(name, {}):
            if axis != in_axis:
                kept = self.kept_along(name, axis)
                weight = weight.index_select(axis, kept)
        every = self._own[name].detach()
        return self._turned(name, weight, every, 0)

    def _turned(self, name: str, kept: Tensor, every: Tensor, axis: int) -> Tensor:
        """Return the kept channels that a weight makes, with those of queries and keys mixed of several."""
        for turn in self.turns.get(name, ()):
            turn.put(kept, every, axis)
        return kept

    def blocks(self, name: str) -> list[Block]:
        """Return the channels that a weight consumes: one by one, or with several positions each if maps are flat."""
        axis = self.survey.in_axis[name]
        assert axis is not None
        weight = self._own[name]
        if weight.dim() == 2:
            wide = wide_blocks(self.model, self.plan, name, axis)
            if wide:
                return wide
        size = weight.shape[axis]
        inputs = torch.arange(size, device=weight.device)
        kept = self.kept_along(name, axis)
        return [Block(inputs[:, None], kept)]
