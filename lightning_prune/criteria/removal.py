"""Rank channels by what removing them really does to the loss: the truth that criteria estimate."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.candidates import classification, classification_loss, evaluate_candidates
from lightning_prune.criteria.numbering import number
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["oracle"]


@register("oracle")
def oracle(
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss: Loss = classification_loss,
    absolute: bool = True,
    resume: str | Path | None = None,
) -> dict[str, Tensor]:
    """Score channels by how much the loss changes when each of them is removed alone.

    The loss is measured once per channel. In a distributed run the ranks share the channels; all must have the same
    batches.

    Args:
        graph: The traced model, run in evaluation mode.
        batches: Batches of data, on the device of the model.
        loss: Given the model and a batch, returns the loss as a scalar: the mean over the examples. The default, the
            cross-entropy of batches ``(inputs, labels)``, can measure several channels at once.
        absolute: Take the absolute change; otherwise channels whose removal lowers the loss score lowest.
        resume: Folder in which results are noted, so that the same call goes on after an interruption.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been removed, and ``inf`` for
        the last channel of a group, which cannot leave.

    Raises:
        ValueError: If there is no batch, or the batches or the outputs do not fit the default loss.

    Note:
        Both forms are the oracles of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017), which measures them on the training set and reports the absolute one as the better.
        Interpretation: a channel leaves from all layers that share it.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, -2.0]]))
        >>> x = torch.tensor([[1.0], [1.0]])
        >>> oracle(trace(model, x), [x], lambda model, x: model(x).mean())["0"]  # -1; -4 and 3 without one
        tensor([3., 4.], dtype=torch.float64)
    """
    removals = [
        (name, channel) for name in graph.groups for channel in graph.kept(name).tolist() if len(graph.kept(name)) > 1
    ]
    candidates: list[dict[str, Tensor]] = [{}]
    for name, channel in removals:
        live = graph.kept(name)
        candidates.append({name: live[live != channel]})

    evaluate = classification if loss is classification_loss else partial(_loss_alone, loss)
    losses = evaluate_candidates(graph, candidates, batches, evaluate=evaluate, resume=resume).loss
    changes = losses[1:] - losses[0]
    found = dict(zip(removals, changes.abs() if absolute else changes, strict=True))
    last = torch.tensor(torch.inf, dtype=torch.float64)
    return number(
        graph,
        {
            name: torch.stack([found.get((name, channel), last) for channel in graph.kept(name).tolist()])
            for name in graph.groups
        },
    )


def _loss_alone(loss: Loss, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    return loss(model, batch), 0.0
