"""The prune that users call: surgery, and what compensates for it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import pruning
from lightning_prune.surgery.compensation.compensating import check_batches, check_method, compensation, run_on
from lightning_prune.surgery.compensation.lockstep import Run
from lightning_prune.surgery.optimizer_contents import listed
from lightning_prune.surgery.pruning import PruneReport
from lightning_prune.surgery.replacing import in_place

__all__ = ["prune"]


def prune(
    model: nn.Module,
    plan: PruningPlan,
    optimizers: Any = (),
    compensate: str = "none",
    batches: Iterable[Any] | None = None,
    run: Run | None = None,
) -> PruneReport:
    """Prune the channels that a plan does not keep, for good and in place, and let those that are kept make up for it.

    Parameters keep their identity: every reference to them (parameter groups, hooks, lists of yours) keeps its meaning.
    State that an optimizer keeps in the shape of a parameter loses the same channels; all other state is kept.
    Everything is checked and worked out before the first tensor is touched.

    ================ ==============================================================================================
    ``compensate``   what is done beside the prune
    ================ ==============================================================================================
    ``"none"``       nothing
    ``"statistics"`` running statistics of batch normalisation follow what is normalised now
    ``"fold"``       and each layer that consumes pruned channels reads from the kept ones what it read from all
    ``"refit"``      layer after layer, weights are fitted by least squares to what the layer returned before
    ================ ==============================================================================================

    The last two also mix the queries and keys that are kept of a head of attention, so that they tell its scores best.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels to keep, about the original model.
        optimizers: The optimizer that trains the model, or several. The next step of one that is not named here
            raises a RuntimeError that says so, if it keeps anything in the shape of what was pruned.
        compensate: One of those above; all but the first look at data.
        batches: What the model is run on in evaluation mode: tensors, tuples of positional or dictionaries of named
            arguments; labels are not needed. Some hundred samples in all are enough.
        run: Runs a model on a batch; default, with the batch as the arguments of ``forward``.

    Returns:
        What changed, and under ``compensation`` how far each layer is from what it computed before.

    Raises:
        ValueError: If the plan is about another architecture, or keeps what has been pruned before; if there is no such
            ``compensate``, or no data for it.
        TypeError: If the model or a part of it is wrapped for distributed training, or an optimizer cannot be sliced.

    Note:
        A plan alone does not make the weights of a network that was compensated: a checkpoint has them.

    Example:
        >>> import torch
        >>> from lightning_prune import criteria, plan, trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> graph = trace(model, torch.zeros(1, 4))
        >>> planned = plan(graph, criteria.magnitude(graph), keep=0.5, round_to=1)
        >>> report = prune(model, planned, compensate="refit", batches=[torch.randn(64, 4)])
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
        >>> report.compensation.errors["2.weight"].after < report.compensation.errors["2.weight"].before
        True
    """
    check_method(compensate)
    check_batches(compensate, batches)
    optimizers = listed(optimizers)
    unwrapped = pruning.check(model, optimizers)
    if compensate == "none" or batches is None:
        return pruning.prune(model, plan, optimizers)
    with progress(f"Compensating {type(model).__name__}"):
        found = compensation(model, plan, compensate, batches, run or run_on)
    with pruning.pruned(model, plan, optimizers) as report, in_place(found.replacements(model, unwrapped)):
        pass
    return replace(report, compensation=found.report)
