"""What a compensation works with, and what it asks about the layers."""

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

__all__ = ["Work"]


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

    def __post_init__(self) -> None:
        self._own = named_tensors(self.model)
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor of the pruned network other values."""
        tensor.data.copy_(values)
        self.changed.add(self._names[id(tensor)])

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
        return outputs.index_select(1, kept)

    def with_kept_outputs(self, name: str) -> Tensor:
        """Return a weight before the prune, less the outputs that are pruned."""
        weight = self._own[name].detach()
        in_axis = self.survey.in_axis[name]
        for axis in self.kept.get(name, {}):
            if axis != in_axis:
                kept = self.kept_along(name, axis)
                weight = weight.index_select(axis, kept)
        return weight

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
