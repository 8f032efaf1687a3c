"""Compensation: what the pruned network has to have in place of some tensors, worked out before anything is pruned."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_prune.graph.entry import as_call
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery.compensation.copies import stand_ins, undisturbed
from lightning_prune.surgery.compensation.folding import InputMoments, fold
from lightning_prune.surgery.compensation.heads import HeadMoments
from lightning_prune.surgery.compensation.lockstep import BothLanes, Lockstep, MakeNetwork, Meeting, Run, networks_of
from lightning_prune.surgery.compensation.normalisation import adapt_statistics
from lightning_prune.surgery.compensation.survey import survey, uses_of
from lightning_prune.surgery.compensation.turning import turn
from lightning_prune.surgery.compensation.weights import measure, refit
from lightning_prune.surgery.compensation.work import Work
from lightning_prune.surgery.compensation_report import CompensationReport
from lightning_prune.surgery.optimizer_state import momentum_to_zero
from lightning_prune.surgery.pruning import kept_positions, pruned_tensors
from lightning_prune.surgery.replacing import Replacement, of_tensor

__all__ = [
    "METHODS",
    "Compensation",
    "check_batches",
    "check_finite",
    "check_method",
    "compensation",
    "compensation_by",
    "folded_by",
    "handlers_of",
    "run_on",
]

METHODS = ("none", "statistics", "fold", "refit")

_ROUNDING = 64  # times the precision: layers of other widths sum in another order

Handler = Callable[[Work, str, Sequence[Meeting]], None]
"""Changes one layer; given the name of its tensor and its calls."""


@dataclass(frozen=True)
class Compensation:
    """What a pruned network is to have in place of some tensors.

    Attributes:
        tensors: The tensors of the pruned network that are not slices of those before, by name.
        report: What was done.
    """

    tensors: dict[str, Tensor]
    report: CompensationReport

    def replacements(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[Replacement]:
        """Make what puts the tensors into a model that has just been pruned, and sets their momentum to zero.

        Args:
            model: The model, of which this is the compensation.
            optimizers: The optimizers that train it, as `lightning_prune.surgery.check` returns them.
        """
        own = named_tensors(model)
        yield from self.replacements_of({name: own[name] for name in self.tensors}, optimizers)

    def replacements_of(
        self, tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer] = ()
    ) -> Iterator[Replacement]:
        """Make the same for tensors, wherever they are.

        Args:
            tensors: Those of what is compensated that there are, by name.
            optimizers: The optimizers that train them.
        """
        for name, values in self.tensors.items():
            tensor = tensors.get(name)
            if tensor is not None:
                yield of_tensor(tensor, values.to(tensor), tensor.grad)
                yield from momentum_to_zero(optimizers, tensor)


def check_method(method: str) -> None:
    """Raise a ValueError unless there is such a method."""
    if method not in METHODS:
        raise ValueError(f"compensate must be one of {', '.join(METHODS)}; got {method!r}.")


def check_batches(method: str, batches: Iterable[Any] | None) -> None:
    """Raise a ValueError unless a method has the batches that it needs.

    Args:
        method: One of `METHODS`.
        batches: The batches, or None.
    """
    if method != "none" and batches is None:
        raise ValueError(
            f"compensate={method!r} looks at data: give `batches`, some hundred samples without labels, or "
            "compensate='none'."
        )


def run_on(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple of positional arguments, or a dictionary of named ones."""
    args, kwargs = as_call(batch)
    return model(*args, **kwargs)


def compensation(
    model: nn.Module, plan: PruningPlan, method: str, batches: Iterable[Any], run: Run = run_on
) -> Compensation:
    """Work out a compensation; the model is not changed in any way, and neither are its mode and the random state.

    Args:
        model: The model that the plan is about, pruned already or not.
        plan: The channels to keep, about the original model.
        method: ``"statistics"``, ``"fold"`` or ``"refit"``.
        batches: What the model is run on.
        run: Runs a model on a batch.

    Raises:
        ValueError: If there is no batch, or what layers are given is not finite.
    """
    return compensation_by(networks_of(model, run), model, plan, method, batches)


def compensation_by(
    make: MakeNetwork, model: nn.Module, plan: PruningPlan, method: str, batches: Iterable[Any]
) -> Compensation:
    """Work out a compensation, as `compensation` does, with networks that are made in a way of one's own.

    Args:
        make: Makes a network.
        model: The model that the plan is about.
        plan: The channels to keep.
        method: ``"statistics"``, ``"fold"`` or ``"refit"``.
        batches: What the model is run on.
    """
    report = CompensationReport(method)
    earlier = plan_in_force(model) or PruningPlan()
    kept = kept_positions(plan.after(earlier), earlier)
    if not kept:
        return Compensation({}, report)
    if iter(batches) is batches:  # which gives its batches only once
        batches = list(batches)
    with undisturbed(model):
        tensors = stand_ins(model, pruned_tensors(model, plan))
        first = next(iter(batches), None)
        if first is None:
            raise ValueError(f"There are no batches to compensate by {method!r} with.")
        found = survey(model, make, first)
        work = Work(model, plan, kept, tensors, found, report)
        handlers = handlers_of(work, method)
        if method != "statistics" and found.multiplies:
            turn(work, HeadMoments(model, make, batches))
        fold(work, folded_by(handlers), InputMoments(model, make, batches))
        _step_through(work, handlers, batches, make)
    if method != "statistics":
        _tell_unseen(work)
    return Compensation({name: tensors[name].detach() for name in sorted(work.changed)}, report)


def folded_by(handlers: Mapping[str, Handler]) -> list[str]:
    """Return the names of the weights that are folded before anything else is done.

    Args:
        handlers: What is to be done at each layer.
    """
    return [name for name, handler in handlers.items() if handler is measure]


def handlers_of(work: Work, method: str) -> dict[str, Handler]:
    """Return what is to be done at each layer, in order, by the name of its tensor.

    Args:
        work: What the compensation works with.
        method: One of `METHODS`.
    """
    shared = {name for name, uses in uses_of(work.model).items() if uses > 1}
    chosen: dict[str, Handler] = {}
    for name, calls in work.survey.calls.items():
        if name not in work.survey.in_axis:
            if calls == 1:
                chosen[name] = adapt_statistics
        elif method != "statistics" and name in shared:
            if work.consumes_pruned(name):
                work.report.not_compensated[name] = "several modules share it"
        elif method == "refit" and calls == 1:
            chosen[name] = refit
        elif method != "statistics" and work.consumes_pruned(name):
            chosen[name] = measure  # what is called several times has no place in an order, and is folded
    return chosen


def _step_through(work: Work, handlers: Mapping[str, Handler], batches: Iterable[Any], make: MakeNetwork) -> None:
    """Carry both networks forward, and let each layer be handled in turn."""
    streams = work.survey.added_to
    lanes = work.survey.lanes()
    lanes_at = {name: lanes[name] for name in handlers}
    plan = work.plan.after(plan_in_force(work.model))
    both = Lockstep(batches, BothLanes(work.model, plan, work.tensors, make, streams).start)
    for name, meetings in both.meetings(lanes_at):
        alike = [meeting for meeting in meetings if _comparable(meeting)]
        for meeting in alike:
            check_finite(name, meeting.output)
        consumes_pruned = work.consumes_pruned(name)
        if consumes_pruned and not alike:
            work.report.not_compensated[name] = "the pruned network does not run it on the same samples and positions"
        elif alike and (consumes_pruned or _drifted(work, name, alike)):
            handlers[name](work, name, alike)
        del meetings, alike  # which keep activations
    work.report.batches = both.batches_seen
    work.report.samples = both.samples_seen


def _comparable(meeting: Meeting) -> bool:
    """Tell whether a layer is given as many samples and positions in both networks."""
    whole = meeting.whole.x.shape
    pruned = meeting.pruned.x.shape
    return whole[0] == pruned[0] and whole[2:] == pruned[2:]


def _drifted(work: Work, name: str, meetings: Sequence[Meeting]) -> bool:
    """Tell whether a layer is given other numbers in the pruned network than before, by more than rounding."""
    for meeting in meetings:
        before = meeting.whole.x
        now = meeting.pruned.x
        if name in work.survey.norms:
            before = work.kept_inputs(name, before)
        if before.shape != now.shape:  # convolution groups are pruned
            return True
        for one_before, one_now in zip(before, now, strict=True):  # most layers show it in the first sample
            rounding = _ROUNDING * torch.finfo(now.dtype).eps
            apart = (one_now - one_before).abs().amax()
            if apart > rounding * one_before.abs().amax():
                return True
    return False


def check_finite(name: str, output: Tensor) -> None:
    """Raise a ValueError unless what a layer of the network before the prune returns is finite.

    Args:
        name: Name of its tensor.
        output: What it returned.
    """
    total = output.sum()  # in no time, and not finite if one number is not
    if not bool(total.isfinite()) and not bool(output.isfinite().all()):
        raise ValueError(
            f"The layer of {name!r} returns numbers that are not finite for these batches; look for NaN in the "
            "batches or in the network."
        )


def _tell_unseen(work: Work) -> None:
    """Note the weights that may consume pruned channels and that nothing is known of."""
    own = named_tensors(work.model)
    for name, axes in work.kept.items():
        if own[name].dim() == 1 or name in work.survey.calls or name in work.survey.terms:
            continue
        consumed = _consumed_along(work.model, name) & axes.keys()
        if name in work.turns:  # which makes channels along its first axis
            consumed -= {0}
        if consumed:
            work.report.not_compensated[name] = "no convolution or linear layer was seen to work with it"


def _consumed_along(model: nn.Module, name: str) -> set[int]:
    """Return the axes along which a weight may consume channels, as far as its module tells."""
    path, _, _ = name.partition(".parametrizations.")
    if path == name:
        path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return set()
    if isinstance(module, nn.Linear | _ConvNd):
        is_transposed = getattr(module, "transposed", False)
        return {0} if is_transposed else {1}
    return set(range(8))
