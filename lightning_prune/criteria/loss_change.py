"""Criterion on what pruning a channel really does to the loss: the truth that other criteria estimate."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.candidates import classification, classification_loss, evaluate_candidates
from lightning_prune.criteria.channel_scores import Scores, to_original_channels
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.finite import REMEDY, cause_in

__all__ = ["oracle"]


@register("oracle")
def oracle(
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss: Loss = classification_loss,
    absolute: bool = True,
    resume: str | Path | None = None,
) -> Scores:
    """Score channels by how much the loss changes when each of them is pruned alone.

    The loss is measured once per channel. In a distributed run the ranks share the channels; all must have the same
    batches.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data, on the device of the model.
        loss: Given the model and a batch, returns the loss as a scalar: the mean over the samples. The default, the
            cross-entropy of batches ``(inputs, labels)``, can measure several channels at once.
        absolute: Take the absolute change; otherwise channels that lower the loss when they are pruned score lowest.
        resume: Folder in which results are noted, so that the same call goes on after an interruption.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned, and ``inf`` for
        the last channel of a group, which cannot be pruned.

    Raises:
        ValueError: If there is no batch, or the batches or the outputs do not fit the default loss.

    Note:
        Both forms are the oracles of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017), which measures them on the training set and reports the absolute one as the better.
        Interpretation: a channel is pruned in all layers that share it.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, -2.0]]))
        >>> x = torch.tensor([[1.0], [1.0]])
        >>> oracle(trace(model, x), [x], lambda model, x: model(x).mean())["0"]  # -1; -4 and 3 without one
        tensor([3., 4.], dtype=torch.float64)
    """
    kept = {name: graph.kept(name) for name in graph.groups}
    prunable = {name: channels for name, channels in kept.items() if len(channels) > 1}
    candidates: list[dict[str, Tensor]] = [{}]
    for name, channels in prunable.items():
        candidates += [{name: channels[channels != channel]} for channel in channels]

    evaluate = classification if loss is classification_loss else partial(_loss_alone, loss)
    losses = evaluate_candidates(graph, candidates, batches, evaluate=evaluate, resume=resume).loss
    if not bool(losses.isfinite().all()):
        cause = cause_in(graph.model, batches) or "the loss is not finite, of the network or once a channel is pruned"
        raise ValueError(f"Nothing can be ranked, as {cause}; {REMEDY}.")
    changes = losses[1:] - losses[0]
    if absolute:
        changes = changes.abs()

    sizes = [len(channels) for channels in prunable.values()]
    by_group = dict(zip(prunable, changes.split(sizes), strict=False))
    last_channel = torch.tensor([torch.inf], dtype=torch.float64)
    return to_original_channels(graph, {name: by_group.get(name, last_channel) for name in graph.groups})


def _loss_alone(loss: Loss, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return loss(model, batch), 0.0
