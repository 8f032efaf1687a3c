"""What the tests of the engine share: networks filled with random numbers, random plans, the central comparisons."""

import copy
import logging
from typing import Any
from unittest.mock import patch

import torch
from fvcore.nn import FlopCountAnalysis
from masked_twin import judge
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan

logging.getLogger("fvcore").setLevel(logging.ERROR)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Fill a model with random numbers that keep activations in range, statistics of normalisation included."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            else:
                tensor.uniform_(0.5, 1.5)
                tensor.mul_(torch.randint(0, 2, tensor.shape) * 2 - 1)
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_var.abs_()
    return model


def torchvision_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a torchvision model, filled with random numbers."""
    import torchvision

    settings: dict[str, Any] = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    if name.startswith(("vgg", "alexnet")):  # whose own initialisation takes seconds
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        model.to_empty(device="cpu")
    else:
        if "segmentation" in torchvision.models.get_model_builder(name).__module__:
            settings["weights_backbone"] = None  # else downloaded
        model = torchvision.models.get_model(name, weights=None, **settings)
    return randomised(model.to(dtype)).eval()


def named_nowhere(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """Return the parameters that neither a group has slices in nor an unprunable module owns."""
    in_groups = {one.tensor for group in graph.groups.values() for one in group.slices}
    unprunable = {name.split("#")[0] for name in graph.unprunable}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in in_groups and (name.rpartition(".")[0] or name) not in unprunable
    ]


def random_plan(graph: ChannelGraph, exact_only: bool = False) -> PruningPlan:
    """Keep a random set of channels of every group."""
    kept = {}
    for name, group in graph.groups.items():
        if group.mask_exact or not exact_only:
            count = int(torch.randint(group.least, group.size + 1, ()))
            kept[name] = torch.randperm(group.size)[:count]
    return graph.plan(kept)


def difference(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Any) -> float:
    """Return how far the masked twins and the pruned network are apart, relative to the largest output.

    The model itself is left alone.
    """
    pruned = {name: planned.pruned.tolist() for name, planned in plan.groups.items()}
    return judge(model.eval(), graph, pruned, inputs).apart


def counted_flops(model: nn.Module, inputs: Any) -> int:
    """Return what fvcore counts on the network as it is, with attention written as the products that it is made of."""
    with patch.object(nn.functional, "scaled_dot_product_attention", attention_in_products):
        analysis = FlopCountAnalysis(model.eval(), inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.total())


def attention_in_products(query: Tensor, key: Tensor, value: Tensor, *_: Any, **settings: Any) -> Tensor:
    """Do what counts of ``scaled_dot_product_attention``."""
    if settings.get("enable_gqa"):
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def assert_pruned(model: nn.Module, inputs: Any, kept: dict[str, list[int]], expected: dict[str, dict[int, list[int]]]):
    """Prune a copy and compare every tensor with the positions that were worked out by hand.

    Args:
        model: The network.
        inputs: Its example inputs.
        kept: The channels that stay, by group.
        expected: The positions that stay, by tensor and axis; every other axis must be whole.
    """
    pruned = copy.deepcopy(model)
    graph = lp.trace(pruned, inputs)
    lp.prune(pruned, graph.plan({name: torch.tensor(channels) for name, channels in kept.items()}))
    before, after = dict(model.state_dict()), dict(pruned.state_dict())
    assert before.keys() == after.keys()
    assert expected.keys() <= before.keys()
    for name, tensor in before.items():
        for axis, index in expected.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.tensor(index))
        assert torch.equal(after[name], tensor), f"{name}: {tuple(after[name].shape)} against {tuple(tensor.shape)}"
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    pruned(*arguments)
