"""Pruning after training, in one call: a network goes in, a smaller one that works comes out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune import planning
from lightning_prune.criteria.registry import score
from lightning_prune.graph import trace
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery.compensation import check_method, prune
from lightning_prune.surgery.compensation.copies import shared_twin, undisturbed
from lightning_prune.surgery.compensation.lockstep import Run
from lightning_prune.surgery.pruning import PruneReport
from lightning_prune.unlabelled import arguments_of_forward, first_entry, forward_arguments

__all__ = ["prune_for"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and named ones."""

Entry = Callable[[nn.Module, Any], Arguments]
"""Given a model and a batch, returns what the model is called with."""

_SAMPLES = 512  # more tell hardly more


def prune_for(
    model: nn.Module,
    batches: Iterable[Any],
    keep: float = 0.5,
    metric: str = "flops",
    round_to: int | str = 8,
    compensate: str = "refit",
    ignore: Sequence[str] = (),
    ranking: str = "global",
    blocks: bool = False,
) -> PruneReport:
    """Prune a trained network to a budget, in place, so that it works without further training.

    The network is traced, its channels are scored by `lightning_prune.criteria.coherent_obs`, the best of them are kept
    within the budget, and their weights are fitted to what each layer returned before. It is run in evaluation mode;
    its mode is as before afterwards, and if anything fails, the network is as before too.

    Args:
        model: The network, a LightningModule or any other module, on any device.
        batches: Data like that which the network is for, such as a loader; labels are not used. A batch is a tensor; a
            list or tuple, of which as many of the first entries are taken as ``forward`` cannot do without, or the
            first one whole if it is a list itself, such as of images, that ``forward`` takes; or a dictionary, of
            which those are taken that ``forward`` has a name for. Batches are drawn until they have 512 samples.
        keep: Fraction of the original cost that may be kept, in (0, 1].
        metric: What the fraction is of: ``"flops"``, ``"params"``, ``"channels"``, or ``"latency"`` as measured on the
            device of the network with the first batch.
        round_to: Layers that lose channels keep a multiple of this many; 1 for no rounding.
        compensate: What makes up for the prune: ``"refit"``, ``"fold"``, ``"statistics"`` or ``"none"``; see
            `lightning_prune.prune`.
        ignore: Patterns of module names whose channels are not pruned.
        ranking: With which others a channel is compared: ``"global"`` or ``"isomorphic"``, see `lightning_prune.plan`.
        blocks: Whether residual blocks are pruned too, each with all that it runs.

    Returns:
        What changed: widths, parameters, the plan with its ``budget``, and what was compensated.

    Raises:
        ValueError: If a setting is out of range, the budget cannot be reached, nothing can be pruned, or there is no
            batch that the network can be run on.
        TypeError: If the model is wrapped for distributed training.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> report = prune_for(model, [torch.randn(64, 8) for _ in range(4)], keep=0.5)
        >>> report.widths["0"], report.plan.budget["achieved"]
        (Change(before=32, after=16), 0.5)
        >>> model(torch.randn(1, 8)).shape
        torch.Size([1, 4])
    """
    planning.check_keep(keep)
    planning.metric_named(metric).roundings(round_to)  # refuses what it does not know
    check_method(compensate)
    planning.check_ranking(ranking)
    drawn = list(_drawn(batches))
    if not drawn:
        raise ValueError("prune_for looks at data: give batches, some hundred samples without labels.")
    entry = _entry(model, drawn[0])
    args, kwargs = _arguments(model, drawn[0], entry)
    graph = trace(model, kwargs or args, ignore=ignore, blocks=blocks)
    if not graph.groups:
        reasons = dict.fromkeys(unprunable.reason for unprunable in graph.unprunable.values())
        told = "; ".join(reasons) or "no layer makes channels"
        raise ValueError(f"prune_for finds nothing to prune: {told}.")
    planning.check_reachable(graph, keep, metric, round_to)
    run: Run = partial(_run, entry=entry)
    scores = score(graph, "coherent_obs", drawn, run)
    planned = planning.plan(graph, scores, keep, metric, round_to, ranking=ranking)
    return prune(model, planned, compensate=compensate, batches=drawn, run=run)


def _drawn(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches until they have enough samples."""
    if isinstance(batches, Tensor):
        raise ValueError("batches must be a list or loader of batches; put a single batch into a list.")
    samples = 0
    for batch in batches:
        yield batch
        samples += _samples_of(batch)
        if samples >= _SAMPLES:
            return


def _samples_of(batch: Any) -> int:
    """Return the length of the first tensor of a batch, at least 1."""
    for leaf in tree_leaves(dict(batch) if hasattr(batch, "keys") else batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return max(1, len(leaf))
    return 1


def _entry(model: nn.Module, batch: Any) -> Entry:
    """Return what a model is called with out of a batch: what is found to work, where a batch begins with a list."""
    usual = partial(forward_arguments, arguments=arguments_of_forward(model))
    if not isinstance(batch, list | tuple) or not isinstance(batch[0], list | tuple):
        return usual
    with undisturbed(model):
        twin = shared_twin(model, named_tensors(model))
        for entry in (usual, _first_entry):
            with suppress(Exception):  # of any kind: the model is not written for it
                _run(twin, batch, entry)
                return entry
    return usual  # which is refused with its own words


def _first_entry(model: nn.Module, batch: Any) -> Arguments:
    return (first_entry(batch),), {}


def _arguments(model: nn.Module, batch: Any, entry: Entry) -> Arguments:
    """Return what the model is called with, on its device."""
    device = next(iter(named_tensors(model).values()), torch.zeros(())).device

    def move(leaf: Any) -> Any:
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    moved: Arguments = tree_map(move, entry(model, batch))
    return moved


def _run(model: nn.Module, batch: Any, entry: Entry) -> Any:
    args, kwargs = _arguments(model, batch, entry)
    return model(*args, **kwargs)
