"""Criteria on what layers consume of a channel: its mean, and how often it is not zero."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.candidates.isolation import of_twin
from lightning_prune.compiled import as_written
from lightning_prune.criteria.channel_scores import Scores, divide_by_norm, to_original_channels
from lightning_prune.criteria.input_hooks import (
    check_watchable,
    positions_of_channels,
    sum_positions,
    watch_inputs,
    watched_places,
)
from lightning_prune.criteria.projections import PROJECTIONS, ProjectionWatch
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.finite import REMEDY, cause_in, not_finite_in
from lightning_prune.graph.neutral import unfused_attention
from lightning_prune.graph.twin import twin_in_evaluation
from lightning_prune.surgery.compensation.compensating import run_on

__all__ = ["apoz", "mean_activation"]

Value = Callable[[Tensor], Tensor]


@register("mean_activation", blocks="none")
def mean_activation(graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None = None) -> Scores:
    """Score channels by the mean of what the layers behind them consume, over all samples and positions.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data.
        loss: Given the model and a batch, runs the model; what it returns is not used. Default: the batch is what the
            model is called with.

    Returns:
        (channels,) score of each group, divided by its Euclidean norm in the group, higher is kept; ``-inf`` for
        channels that have been pruned.

    Raises:
        ValueError: If there is no batch, or a layer that consumes channels cannot be watched or was not run.

    Note:
        One of the criteria that Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017) compare with. Interpretation: what counts is taken after the activation function, by all
        layers that consume the channel alike.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [4.0]]))
        >>> mean_activation(trace(model, torch.zeros(1, 1)), [torch.ones(5, 1)], lambda model, x: model(x).sum())["0"]
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    means = _means_by_group(graph, batches, loss, lambda activation: activation)
    return to_original_channels(graph, divide_by_norm(means))


@register("apoz")
def apoz(graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None = None) -> Scores:
    """Score channels by how often what the layers behind them consume is not zero: 1 less the percentage of zeros.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data.
        loss: Given the model and a batch, runs the model; what it returns is not used. Default: the batch is what the
            model is called with.

    Returns:
        (channels,) score of each group, in [0, 1], higher is kept; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If there is no batch, or a layer that consumes channels cannot be watched or was not run.

    Note:
        The average percentage of zeros is that of Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach
        towards Efficient Deep Architectures" (2016). It says something only behind activation functions that return
        zeros, such as ReLU. Interpretation: all layers that consume a channel count alike.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [-4.0]]))
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
        >>> apoz(trace(model, torch.zeros(1, 1)), [x], lambda model, x: model(x).sum())["0"]
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    means = _means_by_group(graph, batches, loss, lambda activation: activation != 0)
    return to_original_channels(graph, means)


@dataclass
class _Mean:
    """A mean over all samples and positions of what one layer is given.

    Attributes:
        total: (inputs,) float64 sums.
        count: (inputs,) int64, over how many numbers.
    """

    total: Tensor
    count: Tensor

    def __add__(self, other: "_Mean") -> "_Mean":
        return _Mean(self.total + other.total, self.count + other.count)


@torch.no_grad()
def _means_by_group(graph: ChannelGraph, batches: Iterable[Any], loss: Loss | None, value: Value) -> Scores:
    """Return the mean of a value over all that is consumed of each channel: (kept channels,) by group."""
    check_watchable(graph, "The mean over activations", PROJECTIONS)
    means = _Means(graph, value)
    with twin_in_evaluation(graph.model) as twin, as_written(), unfused_attention():
        watch_inputs(replace(graph, model=twin.model), means.add)
        watch = ProjectionWatch(twin.model, means.add_rows)
        run = of_twin(loss or run_on, twin)
        for number, batch in enumerate(batches):
            with watch:
                run(twin.model, batch)
            if means.spoilt:
                in_batch = f"{means.spoilt[0]} in batch {number} (counted from 0)"
                cause = cause_in(graph.model, [batch], number) or in_batch
                raise ValueError(f"Nothing can be ranked, as {cause}; {REMEDY}.")
    return {name: _mean_over_layers(graph, name, means.by_place) for name in graph.groups}


class _Means:
    """Means of a value over what is shown in some places.

    Args:
        graph: The traced model.
        value: What the means are of.

    Attributes:
        by_place: The means, by key of the place.
        spoilt: Which places have shown what is not finite, in words.
    """

    def __init__(self, graph: ChannelGraph, value: Value) -> None:
        self._tensors = graph.tensors()
        self._value = value
        self.by_place: dict[str, _Mean] = {}
        self.spoilt: list[str] = []

    def add(self, key: str, activation: Tensor, axis: int) -> None:
        """Add what a layer consumes or produces."""
        self._add(key, activation, axis, 0, activation.shape[axis])

    def add_rows(self, key: str, activation: Tensor, first: int) -> None:
        """Add what a projection consumes, or produces by its rows from one on."""
        weight, is_output, _ = key.partition(" ")
        size = self._tensors[weight].shape[0] if is_output else activation.shape[-1]
        self._add(key, activation, activation.dim() - 1, first, size)

    def _add(self, key: str, activation: Tensor, axis: int, first: int, size: int) -> None:
        found = not_finite_in(activation)
        if found:
            self.spoilt.append(f"what is consumed with {key!r} holds {found}")
        sums = sum_positions(self._value(activation), axis).sum(0, dtype=torch.float64).cpu()  # (channels shown,)
        shown = slice(first, first + len(sums))
        mean = _Mean(torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64))
        mean.total[shown] = sums
        mean.count[shown] = activation.numel() // activation.shape[axis]
        self.by_place[key] = self.by_place[key] + mean if key in self.by_place else mean


def _mean_over_layers(graph: ChannelGraph, name: str, means: dict[str, _Mean]) -> Tensor:
    """Return the mean over the layers that consume a group: (kept channels,)."""
    by_layer = []
    for key, places in watched_places(graph, graph.groups[name]).items():
        mean = means.get(key)
        if mean is not None:
            inputs = positions_of_channels(graph, name, places)
            by_channel = mean.total[inputs] / mean.count[inputs]  # (kept channels, inputs of a channel)
            by_layer.append(by_channel.mean(1))
    if not by_layer:
        raise ValueError(
            f"Nothing of group {name!r} was consumed: there is no batch, or the loss does not run the model."
        )
    return torch.stack(by_layer).mean(0)
