"""Terms of the cost of a model: sums of products of axis lengths, by metric."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_prune.graph.channel_graph import Group, Term
from lightning_prune.graph.records import CostTerm
from lightning_prune.graph.run import Forward
from lightning_prune.graph.sheets import Lengths, Sheet, axes_of, terms_of
from lightning_prune.graph.substitution import named_tensors

__all__ = ["cost_terms", "take_out"]


def cost_terms(forward: Forward, groups: Mapping[str, Group], sheets: Sequence[Sheet]) -> dict[str, list[Term]]:
    """Return what a model costs.

    Args:
        forward: The forward pass of the model.
        groups: Its groups.
        sheets: What it showed, of its operations too.

    Returns:
        The terms of "flops", "params" and "channels".
    """
    every = len(sheets)
    costs: dict[str, list[Sequence[CostTerm]]] = {
        "flops": list(zip(*(sheet.record.costs for sheet in sheets), strict=True)),
        "params": [[cost] * every for cost in _parameters(forward)],
        "channels": [[cost] * every for cost in _channels(forward, groups)],
    }
    axes = (axis for of_metric in costs.values() for same in of_metric for axis in axes_of(same))
    lengths = Lengths(sheets, groups, axes)
    return {metric: list(terms_of(of_metric, lengths)) for metric, of_metric in costs.items()}


def _parameters(forward: Forward) -> list[CostTerm]:
    """Count the elements of every parameter."""
    counted = {id(tensor) for tensor in named_tensors(forward.submodule).values()}
    terms = []
    for name, tensor in forward.tensors.items():
        if id(tensor) in counted and isinstance(tensor, nn.Parameter):
            terms.append(_elements(forward, name))
    return terms


def _elements(forward: Forward, name: str) -> CostTerm:
    """Return the number of elements of a tensor."""
    labels = forward.labelled.labels(name)
    fixed = 1
    for axis, size in enumerate(forward.shapes[name]):
        if axis not in labels:
            fixed *= size
    return CostTerm(
        fixed,
        tuple(labels.values()),
        _module(name),
    )


def _channels(forward: Forward, groups: Mapping[str, Group]) -> list[CostTerm]:
    """Count every axis of a weight along which channels of groups are produced, each once."""
    terms: dict[tuple[str, int], CostTerm] = {}
    for group in groups.values():
        for out_slice in group.out_slices:
            tensor, axis = out_slice.tensor, out_slice.axis
            labels = forward.labelled.labels(tensor)[axis]
            terms[tensor, axis] = CostTerm(
                1,
                (labels,),
                _module(tensor),
            )
    return list(terms.values())


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def take_out(terms: dict[str, list[Term]], modules: Sequence[str]) -> dict[str, float]:
    """Take the cost of submodules that cannot be pruned out of all metrics.

    Args:
        terms: The terms, by metric; changed in place.
        modules: Names of the submodules.

    Returns:
        The FLOPs of each.
    """
    flops = dict.fromkeys(modules, 0.0)
    for metric, all_terms in terms.items():
        kept = []
        for term in all_terms:
            inside = [name for name in modules if f"{term.module}.".startswith(f"{name}.")]
            if not inside:
                kept.append(term)
            elif metric == "flops":
                lengths = [axis.fixed for axis in term.axes]
                flops[inside[0]] += term.coefficient * math.prod(lengths)
        terms[metric] = kept
    return flops
