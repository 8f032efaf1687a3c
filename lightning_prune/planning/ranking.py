"""Rankings: with which channels of other groups a channel is compared."""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, Group
from lightning_prune.planning.scores import shares_pruned
from lightning_prune.pruning_plan import Slice

__all__ = ["RANKINGS", "check_ranking", "isomorphic_groups", "isomorphic_ranking"]

RANKINGS = ("global", "isomorphic")
"""All groups in one list; or a list for each class of groups that are built alike."""


def check_ranking(ranking: str) -> str:
    """Return a setting; raise a ValueError unless it is one of `RANKINGS`."""
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be one of {', '.join(RANKINGS)}; got {ranking!r}.")
    return ranking


def isomorphic_groups(graph: ChannelGraph) -> list[list[str]]:
    """Return the classes of groups that are built alike, by name, each in the order of the forward pass.

    Groups are built alike if they are of the same kind, and each slice of the one has a slice of the other that lies in
    a module of the same type, in the tensor that it calls by the same name, along the same axis, with as many positions
    per channel and the same size of kernel. How many channels there are does not matter, so that the blocks of all
    stages of a network may be compared.

    Args:
        graph: The traced model.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> widths = [(8, 32), (32, 8), (8, 24), (24, 8)]
        >>> layers = [nn.Linear(before, after) for before, after in widths]
        >>> graph = trace(nn.Sequential(*layers, nn.Flatten(0), nn.Linear(8, 2)), torch.zeros(1, 8))
        >>> isomorphic_groups(graph)
        [['0', '1', '2', '3']]
    """
    classes: dict[frozenset[tuple[object, int]], list[str]] = {}
    for name, group in graph.groups.items():
        structure = _structure(graph, group)
        classes.setdefault(structure, []).append(name)
    return list(classes.values())


def isomorphic_ranking(graph: ChannelGraph, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank channels within the groups that are built alike: (channels,) float64 of every group, in [0, 1].

    A channel gets the fraction of the channels of its class that are pruned before or with it. To prune all channels
    below a number is then to take the same share of every class.

    Args:
        graph: The traced model.
        scores: (channels,) score of each channel of every group, as `checked_scores` returns them. Channels that are
            pruned already count in their class; groups that keep all channels do not.

    Note:
        The method is that of Fang et al., "Isomorphic Pruning for Vision Models" (ECCV 2024).
    """
    ranking = dict(scores)
    for names in isomorphic_groups(graph):
        compared = [name for name in names if not _keeps_all(scores[name])]
        if not compared:
            continue
        of_class = torch.cat([scores[name] for name in compared])
        is_fixed = of_class.isinf()
        shares = shares_pruned(of_class)
        ranked = torch.where(is_fixed, of_class, shares)
        sizes = [len(scores[name]) for name in compared]
        ranking.update(zip(compared, ranked.split(sizes), strict=True))
    return ranking


def _keeps_all(scores: Tensor) -> bool:
    is_whole = scores == math.inf
    return bool(is_whole.any())


def _structure(graph: ChannelGraph, group: Group) -> frozenset[tuple[object, int]]:
    """Return what groups that are built alike have in common: their kind, and how many slices of each description."""
    sides = {
        "out": group.out_slices,
        "in": group.in_slices,
        "other": group.other_slices,
    }
    described: Counter[object] = Counter([group.kind])
    for side, slices in sides.items():
        described.update((side, *_description(graph, group, one)) for one in slices)
    return frozenset(described.items())


def _description(graph: ChannelGraph, group: Group, of_group: Slice) -> tuple[object, ...]:
    """Say where a slice lies, whatever the module is called and however many channels there are."""
    module, _, name = of_group.tensor.rpartition(".")
    kind = type(graph.model.get_submodule(module))
    kernel_size = graph.shapes[of_group.tensor][2:]
    positions = of_group.count(1) if group.least else 0  # of a block, all that there are
    return f"{kind.__module__}.{kind.__qualname__}", name, of_group.axis, positions, kernel_size
