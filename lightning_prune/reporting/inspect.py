"""What can be pruned in a network and what cannot, as text."""

from lightning_prune.graph import ChannelGraph
from lightning_prune.planning.cost import CostModel

__all__ = ["describe"]


def describe(graph: ChannelGraph) -> str:
    """Describe the channel groups of a model, what they cost, and what stays whole and why.

    Args:
        graph: The traced model.

    Returns:
        A table of groups: name, channels, share of the FLOPs and parameters that would go if all but one of its
        channels went, and the layers that are coupled; then what is held, with the reason.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(describe(trace(model, torch.zeros(1, 2))))
        1 group of 8 channels can be pruned
        group  channels  flops  params  layers
        0             8  87.5%   83.3%  0, 2
        stays whole: 2 (2 channels): 2: is an output of the network
    """
    costs = [CostModel(graph, metric) for metric in ("flops", "params")]
    rows: list[list[str]] = [["group", "channels", "flops", "params", "layers"]]
    for name, group in graph.groups.items():
        shares = [f"{1 - cost({name: 1}) / max(cost.original, 1):.1%}" for cost in costs]
        layers = dict.fromkeys(part.tensor.rpartition(".")[0] for part in group.slices)
        inexact = f" (not exact: {group.not_mask_exact})" if group.not_mask_exact else ""
        rows.append([name, str(group.size), *shares, ", ".join(layers) + inexact])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    total = sum(group.size for group in graph.groups.values())
    lines = [f"{_count(len(graph.groups), 'group')} of {_count(total, 'channel')} can be pruned"]
    for row in rows:
        cells = [number.rjust(width) for number, width in zip(row[1:4], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[4]]))
    for name, held in graph.unprunable.items():
        lines.append(f"stays whole: {name} ({_count(held.channels, 'channel')}): {held.reason}")
    return "\n".join(lines)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
