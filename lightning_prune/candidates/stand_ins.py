"""Stand-ins for the tensors of a model: what makes it compute what a candidate computes.

They are made here and put in place by the runners. No model is changed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.candidates.candidate import Noise
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.masks import in_positions_of_pruned

__all__ = ["input_masks", "maskable_layers", "masked_tensors", "noisy_tensors"]

Tensors = Mapping[str, Tensor]


def masked_tensors(graph: ChannelGraph, plan: PruningPlan, tensors: Tensors) -> dict[str, Tensor]:
    """Return copies of the tensors that consume channels which a plan prunes, with zeros in their in-channel slices.

    Args:
        graph: The traced model.
        plan: The kept channels.
        tensors: The tensors of the model, by name.
    """
    masked: dict[str, Tensor] = {}
    for name, axis, positions in in_positions_of_pruned(graph, plan):
        tensor = masked.get(name)
        if tensor is None:
            tensor = tensors[name].detach().clone()
            masked[name] = tensor
        tensor.index_fill_(axis, positions.to(tensor.device), 0)
    return masked


def noisy_tensors(graph: ChannelGraph, noise: Noise, tensors: Tensors) -> dict[str, Tensor]:
    """Return copies of the weights that produce the channels of a group, with noise on them.

    Args:
        graph: The traced model.
        noise: Group, strength and seed.
        tensors: The tensors of the model, by name.
    """
    generator = torch.Generator().manual_seed(noise.seed)
    group = graph.group(noise.group)
    weights = [place.tensor for place in group.out_slices]
    noisy = {}
    for name in dict.fromkeys(weights):
        weight = tensors[name].detach()
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        deviation = noise.strength * weight.std(correction=0)
        noisy[name] = weight + deviation * drawn.to(weight)
    return noisy


def maskable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose inputs are the columns of their own weight, by its name.

    For these, a mask on the input does what zeros in the weight do, where nothing but the layer itself uses it.
    """
    owners: Counter[int] = Counter()  # of each parameter, by id
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += 1
    layers = {}
    for name, module in model.named_modules():
        if not _inputs_are_columns(module):
            continue
        if owners[id(module.weight)] == 1:  # none owns a weight that is computed
            weight = f"{name}.weight" if name else "weight"
            layers[weight] = module
    return layers


def _inputs_are_columns(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return type(module) is nn.Linear


def input_masks(graph: ChannelGraph, plans: Sequence[PruningPlan], tensors: Tensors) -> dict[str, Tensor]:
    """Return which of their inputs layers still consume, for several sub-networks.

    Args:
        graph: The traced model.
        plans: The kept channels of each sub-network.
        tensors: The tensors of the model, by name; those that consume pruned channels must be among `maskable_layers`.

    Returns:
        (plans, inputs) one for kept inputs and zero for pruned ones, by name of the weight that consumes them.
    """
    masks: dict[str, Tensor] = {}
    for row, plan in enumerate(plans):
        for name, _, positions in in_positions_of_pruned(graph, plan):
            mask = masks.get(name)
            if mask is None:
                weight = tensors[name]
                mask = weight.new_ones(len(plans), weight.shape[1])
                masks[name] = mask
            inputs = positions.to(mask.device)
            mask[row, inputs] = 0
    return masks
