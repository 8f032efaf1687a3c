"""Trial of residual blocks: a network without one returns what it does with zeros in its last layer, or it stays."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.blocks import Block
from lightning_prune.graph.nested import nested_tensors
from lightning_prune.graph.neutral import neutral_state
from lightning_prune.graph.run import Forward
from lightning_prune.graph.twin import Twin, set_mode
from lightning_prune.pruning_plan import Adaptation, PlannedGroup, PruningPlan

__all__ = ["adaptations_with", "why_not_pruned"]

_CLOSE = 1e-4  # relative to the largest output, in the precision of the model


def adaptations_with(adaptations: Mapping[str, Adaptation], blocks: Sequence[Block]) -> dict[str, Adaptation]:
    """Return what has to be adapted in modules, those of blocks included.

    Args:
        adaptations: What follows other groups, by the names of modules.
        blocks: The blocks.
    """
    joined = dict(adaptations)
    for block in blocks:
        for name, absence in block.absences.items():
            alone = Adaptation(absence=absence)
            joined[name] = joined[name].after(alone) if name in joined else alone
    return joined


def why_not_pruned(forward: Forward, adaptations: Mapping[str, Adaptation], blocks: Sequence[Block]) -> dict[str, str]:
    """Run a network without blocks, all of them or each alone, and say which cannot be pruned, by name, and why.

    Args:
        forward: The forward pass.
        adaptations: What follows groups in modules, those of blocks included, by the names of these.
        blocks: The blocks.
    """
    run = _Run(forward, adaptations)
    if not blocks or not run.why_unlike(blocks):
        return {}
    reasons = {block.group.name: run.why_unlike([block]) for block in blocks}
    found = {name: reason for name, reason in reasons.items() if reason}
    return found or dict.fromkeys(reasons, run.why_unlike(blocks))


class _Run:
    """Run a network with weights that are drawn, with all of its blocks or without some.

    Args:
        forward: The forward pass.
        adaptations: What follows groups in modules, by the names of these.
    """

    def __init__(self, forward: Forward, adaptations: Mapping[str, Adaptation]) -> None:
        self.forward = forward
        self.adaptations = adaptations
        generator = torch.Generator().manual_seed(0)
        self.tensors = {}
        for name, tensor in forward.tensors.items():
            self.tensors[name] = _drawn(tensor, forward.shapes[name], generator)

    def why_unlike(self, blocks: Sequence[Block]) -> str:
        """Say why a network without some blocks is not what it is with zeros in their last layers; empty if it is."""
        name = blocks[0].group.name
        groups = {}
        masked = dict(self.tensors)
        for block in blocks:
            group = block.group
            groups[group.name] = PlannedGroup(1, (), group.slices, least=0)
            for one in group.in_slices:
                masked[one.tensor] = torch.zeros_like(masked[one.tensor])
        plan = PruningPlan(groups, self.forward.shapes, adaptations=dict(self.adaptations))
        expected = self._outputs(masked, PruningPlan())
        try:
            outputs = self._outputs(self._cut(plan), plan)
        except Exception as raised:
            return f"{name}: the network fails without it ({type(raised).__name__}: {raised})"
        pairs = zip(expected, outputs, strict=True)
        if all(_are_alike(one, other) for one, other in pairs):
            return ""
        return f"{name}: adds something although the weights of its last layer are zero"

    def _cut(self, plan: PruningPlan) -> dict[str, Tensor]:
        """Return the tensors without what a plan prunes."""
        cut = dict(self.tensors)
        for name, axes in plan.index().items():
            for axis, kept in axes.items():
                cut[name] = cut[name].index_select(axis, kept.to(cut[name].device))
        return cut

    @torch.no_grad()
    def _outputs(self, tensors: Mapping[str, Tensor], plan: PruningPlan) -> list[Tensor]:
        forward = self.forward
        stand_ins = {id(tensor): tensors[name].clone() for name, tensor in forward.tensors.items()}
        with neutral_state(forward.submodule):
            twin = Twin(forward.submodule, stand_ins)
            adapt(twin.model, plan, forward.earlier, forward.module)
            set_mode(twin.model, False)
            forward.let_in(twin.model)
            output = twin.model(*forward.args, **forward.kwargs)
        return list(nested_tensors(output))


def _drawn(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a tensor like one of a network, of its original shape and with numbers that are drawn."""
    if not tensor.is_floating_point():
        same = tuple(tensor.shape) == shape
        return tensor.detach().clone() if same else tensor.new_zeros(shape)
    numbers: Any = torch.rand(shape, generator=generator)
    if len(shape) > 1:
        inputs = max(1, numbers[0].numel())
        numbers = (2 * numbers - 1) * inputs**-0.5
    else:
        numbers = numbers + 0.5
    return numbers.to(tensor.device, tensor.dtype)


def _are_alike(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    if first.is_meta or not first.is_floating_point():
        return True
    largest = float(first.abs().max()) if first.numel() else 0.0
    return bool(torch.allclose(first, second, rtol=0, atol=_CLOSE * largest, equal_nan=True))
