"""Masks: channels that are still there but that nobody reads; and statistics that follow what is left."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.modules import named_tensors
from lightning_prune.plan import PlannedGroup, PruningPlan

__all__ = ["leaving", "read_from_removed", "recalibrate", "zero_removed"]


@torch.no_grad()
def zero_removed(graph: ChannelGraph, plan: PruningPlan) -> None:
    """Zero what is read from the channels that a plan removes, in place; the network then computes what pruning leaves.

    What is zeroed is the input side of the layers behind the channels, not the channels themselves: a normalisation or
    an activation in between may turn a zero into something else.

    Args:
        graph: The traced model, pruned already or not.
        plan: The channels that stay.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> zero_removed(graph, graph.plan({"0": torch.tensor([0, 2])}))
        >>> model[2].weight[0, 1].item()
        0.0
    """
    tensors = named_tensors(graph.model)
    for name, axis, positions in read_from_removed(graph, plan):
        tensors[name].index_fill_(axis, positions.to(tensors[name].device), 0)


def read_from_removed(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[str, int, Tensor]]:
    """Yield where tensors read channels that a plan removes and that the model still has.

    Yields:
        Name of the tensor, axis, (n,) int64 positions along it as the model is now.
    """
    for name, group in plan.groups.items():
        channels = leaving(graph, name, group)
        for part in graph.group(name).readers if len(channels) else ():
            yield part.tensor, part.axis, graph.positions_now(part, channels)


def leaving(graph: ChannelGraph, name: str, group: PlannedGroup) -> Tensor:
    """Return the channels of a group that a plan removes and that the model still has, as (n,) int64."""
    live = graph.live(name)
    return live[~torch.isin(live, torch.tensor(group.kept))]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Estimate the running statistics of batch normalisation anew, in place, as the mean over some batches.

    Masks and removal change the statistics of the layers behind them; this corrects them without training. Everything
    but the statistics is left as it is, the mode of the modules included.

    Args:
        model: The model.
        batches: The batches to take statistics from.
        run: Runs a model on a batch; default ``model(batch)``.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> norm = nn.BatchNorm1d(1).eval()
        >>> recalibrate(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> norm.running_mean, norm.running_var, norm.training
        (tensor([4.]), tensor([2.]), False)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = [(m, m.training) for m in model.modules()]
    batches = iter(batches)
    first = list(islice(batches, 1))
    if not first:
        raise ValueError("There are no batches to estimate the statistics of batch normalisation from.")
    momenta = [norm.momentum for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None
        for batch in chain(first, batches):
            (run or nn.Module.__call__)(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
