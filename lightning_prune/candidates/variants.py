"""Candidates: sub-networks of a model and damaged copies, as tensors and masks that stand in for the model's own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.masks import in_positions_of_pruned

__all__ = ["Candidate", "Noise", "digest", "input_masks", "masked", "noisy", "plain_readers"]


@dataclass(frozen=True)
class Noise:
    """A copy of the model with Gaussian noise on the weights that make the channels of one group.

    Attributes:
        group: The group.
        strength: Standard deviation of the noise, as a fraction of that of the weights of each layer.
        seed: Seed of the draw, which is the same on every device.
    """

    group: str
    strength: float
    seed: int


Candidate = PruningPlan | Noise


def digest(candidate: Candidate) -> str:
    """Return a hash of what a candidate is."""
    if isinstance(candidate, PruningPlan):
        return candidate.digest
    return hashlib.sha256(repr(candidate).encode()).hexdigest()


def masked(graph: ChannelGraph, plan: PruningPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors that read what a plan removes, with zeros there.

    Args:
        graph: The traced model.
        plan: The channels that stay.
        tensors: The tensors of the model, by name.
    """
    found: dict[str, Tensor] = {}
    for name, axis, positions in in_positions_of_pruned(graph, plan):
        if name not in found:
            found[name] = tensors[name].detach().clone()
        found[name].index_fill_(axis, positions.to(found[name].device), 0)
    return found


def noisy(graph: ChannelGraph, noise: Noise, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the weights that make the channels of a group, with noise on them.

    Args:
        graph: The traced model.
        noise: Group, strength and seed.
        tensors: The tensors of the model, by name.
    """
    generator = torch.Generator().manual_seed(noise.seed)
    found = {}
    for name in dict.fromkeys(part.tensor for part in graph.group(noise.group).out_slices):
        weight = tensors[name].detach()
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        found[name] = weight + noise.strength * weight.std(correction=0) * drawn
    return found


def plain_readers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose inputs are the columns of their own weight, by its name.

    For these, a mask on the input does what zeros in the weight do, where nothing but the layer itself reads it.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if _reads_columns(module) and uses.get(id(module.weight)) == 1  # none for one that is computed
    }


def _reads_columns(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    return convolution or type(module) is nn.Linear


def input_masks(graph: ChannelGraph, plans: Sequence[PruningPlan], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which inputs the layers behind removed channels still read.

    Args:
        graph: The traced model.
        plans: The channels that stay, for each sub-network.
        tensors: The tensors of the model, by name; what reads removed channels must be among `plain_readers`.

    Returns:
        (plans, inputs) one for what is read and zero for what is not, by name of the weight that reads.
    """
    masks: dict[str, Tensor] = {}
    for row, plan in enumerate(plans):
        for name, _, positions in in_positions_of_pruned(graph, plan):
            if name not in masks:
                masks[name] = tensors[name].new_ones(len(plans), tensors[name].shape[1])
            masks[name][row, positions.to(masks[name].device)] = 0
    return masks
