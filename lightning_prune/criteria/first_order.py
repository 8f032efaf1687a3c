"""Criterion on a first-order estimate of what pruning a channel does to the loss."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.candidates.isolation import of_twin
from lightning_prune.compiled import as_written
from lightning_prune.criteria.channel_scores import (
    Scores,
    divide_by_norm,
    flops_per_channel,
    refuse_blocks,
    to_original_channels,
    with_blocks,
)
from lightning_prune.criteria.first_order_sums import GRADIENT_FORMS, VARIANTS, Totals, make_collector
from lightning_prune.criteria.registry import Loss, register
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.finite import REMEDY, cause_in
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.graph.twin import twin_in_evaluation

__all__ = ["check_settings", "finish", "is_normalized", "taylor", "why_unseen"]

Parameters = dict[str, nn.Parameter]


def is_normalized(variant: str, normalize: bool | None) -> bool:
    """Tell whether scores are divided by the norm of their group.

    Args:
        variant: The variant of the criterion.
        normalize: What is asked for; None for what the source of the variant does.
    """
    return variant not in GRADIENT_FORMS if normalize is None else normalize


def _says_of_blocks(settings: dict[str, Any]) -> str:
    variant = settings.get("variant", "a")
    return "none" if is_normalized(variant, settings.get("normalize")) else "own"


@register("taylor", blocks=_says_of_blocks)
def taylor(
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss: Loss,
    variant: str = "a",
    normalize: bool | None = None,
    flops_penalty: float = 0.0,
) -> Scores:
    """Score channels by how much the loss changes, to first order, when all that is consumed of them is set to zero.

    ============================ ===========================================================================
    variant                      score, with activation a and gradient g of the loss where layers consume
    ============================ ===========================================================================
    ``"a"``                      mean over samples of the absolute sum of ``a * g`` over positions
    ``"b"``                      mean over samples of the sum of ``|a * g|`` over positions
    ``"c"``                      absolute mean over all samples of the sum of ``a * g`` over positions
    ``"gate"``                   mean over batches of the squared derivative by a factor on the channel
    ``"sum_then_square"``        mean over batches of the squared sum of weight times gradient
    ``"square_then_sum"``        mean over batches of the sum of squared weight times gradient
    ============================ ===========================================================================

    The last two take the parameters that produce the channel: filters, biases and normalisation.

    Args:
        graph: The traced model, run in evaluation mode; its gradients do not change.
        batches: Batches of data.
        loss: Given the model and a batch, returns the loss as a scalar: the mean over the samples.
        variant: One of those above.
        normalize: Divide the scores of each group by their Euclidean norm; default, as the sources do, for ``"a"``,
            ``"b"`` and ``"c"`` only.
        flops_penalty: How much of the cost of a channel is subtracted from its score, after the division: the FLOPs
            that one channel less would save, divided by their sum over the groups.

    Returns:
        (channels,) score of each group, higher is kept; ``-inf`` for channels that have been pruned.

    Raises:
        ValueError: If a setting is out of range, a layer that consumes channels cannot be watched (variants a, b, c),
            or no finite gradient of a group was seen.

    Note:
        Variant a is the equation of Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference" (ICLR 2017), with the L2 norm of each layer and the FLOPs term; b is that of the authors' later code
        and c that of a popular reimplementation. Gate and weight forms are those of Molchanov et al., "Importance
        Estimation for Neural Network Pruning" (CVPR 2019): ``sum_then_square`` as in the paper, ``square_then_sum`` as
        in its code. Interpretations: positions are summed rather than averaged, which the norm cancels; contributions
        of several layers that consume a channel are added, since pruning it takes it away from all of them, and are not
        divided by their number as in the code of 2019; the norm is taken once, of the means (the code takes it per
        batch); the paper's weight of 0.001 is for a FLOPs term whose units are not known, so that it is 0 here; the
        gate covers all that is consumed of a channel, behind the activation function.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[3.0, 2.0]]))
        >>> x = torch.tensor([[1.0], [1.0]])
        >>> taylor(trace(model, x), [x], lambda model, x: model(x).mean())["0"]  # 3 and 4, by their norm
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    check_settings(variant, flops_penalty)
    whole, graph = graph, graph.channels()
    totals = Totals()
    with twin_in_evaluation(graph.model) as twin, as_written(), torch.enable_grad():
        collector = make_collector(replace(graph, model=twin.model), variant, totals)
        collector.listen()
        parameters = _trained_parameters(twin.model)
        run = of_twin(loss, twin)
        for batch in batches:
            value = run(twin.model, batch)
            totals.begin_step(value)
            collector.before_backward()
            gradients = _gradients(value, parameters)
            collector.after_backward(1.0)
            collector.before_step(gradients)
            collector.after_batch()
    unseen = totals.unseen(graph)
    if unseen:
        reason = why_unseen(graph, totals, batches) or "no batch, or the loss does not need them"
        raise ValueError(f"No finite gradient was seen of {', '.join(unseen)}: {reason}.")
    return finish(whole, totals, variant, normalize, flops_penalty)


def finish(graph: ChannelGraph, totals: Totals, variant: str, normalize: bool | None, flops_penalty: float) -> Scores:
    """Turn totals into scores; see `taylor`.

    Args:
        graph: The traced model.
        totals: Sums and counts of every group.
        variant: The variant that they are of.
        normalize: Divide by the Euclidean norm of the group; None for what the source of the variant does.
        flops_penalty: Weight of the cost of a channel.
    """
    whole, graph = graph, graph.channels()
    scores = {name: totals.sums[name].cpu() / totals.counts[name].cpu() for name in graph.groups}
    if variant == "c":
        scores = {name: values.abs() for name, values in scores.items()}
    if is_normalized(variant, normalize):
        if whole.blocks:
            refuse_blocks("taylor with normalize=True")
        scores = divide_by_norm(scores)
    if flops_penalty:
        flops = flops_per_channel(graph)
        scores = {name: values - flops_penalty * flops[name] for name, values in scores.items()}
    return with_blocks(whole, to_original_channels(graph, scores))


def why_unseen(graph: ChannelGraph, totals: Totals, batches: Iterable[Any] = ()) -> str:
    """Say which numbers that are not finite are the reason that nothing was seen of a group; nothing if none are.

    Args:
        graph: The traced model.
        totals: What was collected.
        batches: What it was collected from, if that can be had again.
    """
    counted = totals.not_finite()
    if not counted:
        return ""
    cause = cause_in(graph.model, batches)
    return f"{counted}{f', and {cause}' if cause else ''}; {REMEDY}"


def check_settings(variant: str, flops_penalty: float) -> None:
    """Raise a ValueError unless the settings are in range."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.")
    if not 0 <= flops_penalty < float("inf"):
        raise ValueError(f"flops_penalty must be a number of at least 0; got {flops_penalty!r}.")


def _gradients(value: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one, by name; those that the parameters keep do not change."""
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    by_name = zip(parameters, gradients, strict=True)
    return {name: gradient for name, gradient in by_name if gradient is not None}


def _trained_parameters(model: nn.Module) -> Parameters:
    """Let gradients flow to every parameter of a twin, frozen ones included, and return them by name."""
    parameters: Parameters = {}
    for name, tensor in named_tensors(model).items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(True)
            parameters[name] = tensor
    return parameters
