"""Narrow groups: those that a plan leaves hardly anything of, while it keeps most of the others."""

from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["narrow_groups"]

_NARROW = 0.1  # of the fraction that is kept of all channels


def narrow_groups(graph: ChannelGraph, plan: PruningPlan) -> dict[str, float]:
    """Return the groups that keep less than a tenth of what is kept of all channels, with the fraction that they keep.

    All that comes behind has to do with what runs through such a group, and neither compensation nor training helps.
    Residual blocks are no such groups, nor is what is pruned with them.

    Args:
        graph: The traced model.
        plan: The channels to keep.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 20), nn.Linear(20, 20), nn.Linear(20, 1))
        >>> graph = trace(model, torch.zeros(1, 1))
        >>> narrow_groups(graph, graph.plan({"0": torch.tensor([3])}))
        {'0': 0.05}
    """
    widths = plan.widths
    sizes = {}
    for name, group in graph.groups.items():
        if not _is_of_pruned_block(graph, plan, group):
            sizes[name] = group.size
    kept = {name: widths.get(name, size) for name, size in sizes.items()}
    total = max(1, sum(sizes.values()))
    of_all = sum(kept.values()) / total
    fractions = {name: kept[name] / size for name, size in sizes.items()}
    return {name: fraction for name, fraction in fractions.items() if fraction < _NARROW * of_all}


def _is_of_pruned_block(graph: ChannelGraph, plan: PruningPlan, group: Group) -> bool:
    """Tell whether a group is a residual block, or lies in one that is pruned."""
    if not graph.blocks:
        return False
    if group.name in graph.blocks:
        return True
    pruned = set()
    for name, planned in plan.groups.items():
        if not planned.kept:
            pruned.add(name)
    blocks = {graph.block_of(module) for module in group.modules}
    return blocks <= pruned
