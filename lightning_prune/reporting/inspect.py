"""Description of a network as text: what can be pruned in it, what it costs, and what cannot be pruned."""

from collections.abc import Sequence

from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import plan_in_force
from lightning_prune.reporting.flops import count_flops, told

__all__ = ["describe"]


def describe(graph: ChannelGraph) -> str:
    """Describe the channel groups of a model, what they cost, and what cannot be pruned and why.

    Args:
        graph: The traced model.

    Returns:
        What can be pruned, the FLOPs as fvcore counts them, with the cost model's where they differ, and a table of
        groups: name, channels, share of the FLOPs and parameters that would be saved if all but one of its channels
        were pruned, or a residual block, and the layers that are coupled, with the kind of the channels where they are
        heads, say. Then what is unprunable, with the reason.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(describe(trace(model, torch.zeros(1, 2))))
        1 group of 8 channels can be pruned
        FLOPs: 32 counted by fvcore
        group  channels  flops  params  layers
        0             8  87.5%   83.3%  0, 2
        unprunable: 2 (2 channels): 2: is an output of the network
    """
    flops = CostModel(graph, "flops")
    params = CostModel(graph, "params")
    rows = [("group", "channels", "flops", "params", "layers")]
    for name, group in graph.groups.items():
        least = min(group.least, 1)
        saved = _saved(flops, name, least), _saved(params, name, least)
        rows.append((name, str(group.channels), *saved, _layers(group)))
    of_channels = [group for name, group in graph.groups.items() if name not in graph.blocks]
    channels = sum(group.channels for group in of_channels)
    groups = _count(len(of_channels), "group")
    blocks = f", and {_count(len(graph.blocks), 'block')}" if graph.blocks else ""
    lines = [
        f"{groups} of {_count(channels, 'channel')}{blocks} can be pruned",
        _flops(graph, flops),
        *_aligned(rows),
    ]
    for name, found in graph.unprunable.items():
        size = _count(found.channels, "channel")
        lines.append(f"unprunable: {name} ({size}): {found.reason}")
    return "\n".join(lines)


def _flops(graph: ChannelGraph, cost: CostModel) -> str:
    """Say how many FLOPs the network has now, by both counts where they differ."""
    plan = plan_in_force(graph.model)
    widths = {} if plan is None else plan.widths
    modelled = int(cost(widths))
    network = graph.model.get_submodule(graph.module)
    counted = count_flops(network, graph.example_inputs)
    return f"FLOPs: {told(counted, modelled)}"


def _saved(cost: CostModel, group: str, least: int) -> str:
    kept = cost({group: least}) / max(cost.original, 1)
    return f"{1 - kept:.1%}"


def _layers(group: Group) -> str:
    layers: dict[str, None] = {}
    for coupled in group.slices:
        layer, _, _ = coupled.tensor.rpartition(".")
        layers[layer] = None
    told_layers = ", ".join(layers)
    if group.kind != "channels":
        told_layers += f" ({group.kind})"
    if group.width > 1:
        told_layers += f" ({group.width} channels at a time)"
    if group.not_mask_exact:
        told_layers += f" (not mask-exact: {group.not_mask_exact})"
    return told_layers


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows as lines: the first cell aligned to its left, the last as it is, those between to their right."""
    columns = zip(*rows, strict=True)
    name_width, *number_widths, _ = [max(map(len, column)) for column in columns]
    lines = []
    for name, *numbers, layers in rows:
        cells = map(str.rjust, numbers, number_widths)
        line = "  ".join([name.ljust(name_width), *cells, layers])
        lines.append(line)
    return lines


def _count(number: int, word: str) -> str:
    plural = "" if number == 1 else "s"
    return f"{number:,} {word}{plural}"
