"""Copies of the modules of a model that share tensors, and the positions that a plan keeps of these."""

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.graph.sizes import sync_attributes
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import Index, PruningPlan, plan_in_force

__all__ = ["copy_on", "kept_positions", "stand_ins"]


def copy_on(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy the modules of a model, and whatever they write down, in evaluation mode and on given tensors.

    Args:
        model: The model.
        tensors: What the copy has in place of each parameter and buffer, by name; these are not copied.
    """
    memo: dict[int, object] = {}
    for name, tensor in named_tensors(model).items():
        memo[id(tensor)] = tensors[name]
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # such as the weight that an old weight norm computes
                memo[id(value)] = value.detach()
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        vars(module)["training"] = False
        sync_attributes(module)
    return copied


def stand_ins(model: nn.Module, smaller: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a pruned model that can be written to, by name.

    Args:
        model: The model.
        smaller: The tensors that are not those of the model.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        made[name] = smaller[name] if name in smaller else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            made[name] = nn.Parameter(made[name], requires_grad=False)
    return made


def kept_positions(model: nn.Module, plan: PruningPlan) -> Index:
    """Return the positions to keep of the tensors as they are now, by name and axis, for the axes that get shorter.

    Args:
        model: The model, pruned already or not.
        plan: The channels to keep, about the original model.
    """
    earlier = plan_in_force(model)
    before = earlier.index() if earlier else {}
    positions: Index = defaultdict(dict)
    for name, axes in plan.after(earlier).index().items():
        axes_before = before.get(name, {})
        for axis, kept in axes.items():
            now = axes_before.get(axis)
            if now is None:
                positions[name][axis] = kept
            elif len(now) != len(kept):
                positions[name][axis] = torch.searchsorted(now, kept)
    return dict(positions)
