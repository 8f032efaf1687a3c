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
        were pruned, and the layers that are coupled. Then what is unprunable, with the reason.

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
        rows.append((name, str(group.size), _saved(flops, name), _saved(params, name), _layers(group)))
    channels = sum(group.size for group in graph.groups.values())
    reasons = [
        f"unprunable: {name} ({_count(found.channels, 'channel')}): {found.reason}"
        for name, found in graph.unprunable.items()
    ]
    return "\n".join(
        [
            f"{_count(len(graph.groups), 'group')} of {_count(channels, 'channel')} can be pruned",
            _flops(graph, flops),
            *_aligned(rows),
            *reasons,
        ]
    )


def _flops(graph: ChannelGraph, cost: CostModel) -> str:
    """Say how many FLOPs the network has now, by both counts where they differ."""
    plan = plan_in_force(graph.model)
    modelled = int(cost(plan.widths if plan is not None else {}))
    counted = count_flops(graph.model.get_submodule(graph.module), graph.example_inputs)
    total = modelled if counted.total is None else counted.total
    return f"FLOPs: {told(total, modelled, counted.failure)}"


def _saved(cost: CostModel, group: str) -> str:
    return f"{1 - cost({group: 1}) / max(cost.original, 1):.1%}"


def _layers(group: Group) -> str:
    tensors = [coupled.tensor for coupled in group.slices]
    layers = dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors)
    remark = f" (not mask-exact: {group.not_mask_exact})" if group.not_mask_exact else ""
    return ", ".join(layers) + remark


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows as lines: the first cell aligned to its left, the last as it is, those between to their right."""
    first, *between, _ = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    lines = []
    for name, *numbers, layers in rows:
        cells = [number.rjust(max(lengths)) for number, lengths in zip(numbers, between, strict=True)]
        lines.append("  ".join([name.ljust(max(first)), *cells, layers]))
    return lines


def _count(number: int, word: str) -> str:
    plural = "" if number == 1 else "s"
    return f"{number:,} {word}{plural}"
