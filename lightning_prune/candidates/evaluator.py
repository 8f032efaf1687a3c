"""Entry to the measurement of candidates: it goes through the batches, shares the work among ranks and adds up.

How a candidate is run is decided in `jobs` and done by a `Runner`; what has been measured before comes from `notes`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.compensating import CompensatingRunner
from lightning_prune.candidates.finite import refuse_not_finite
from lightning_prune.candidates.isolation import of_twin, undisturbed
from lightning_prune.candidates.jobs import Job, share
from lightning_prune.candidates.journal import Entry
from lightning_prune.candidates.measures import Evaluate, classification, samples_in
from lightning_prune.candidates.memory import Memory
from lightning_prune.candidates.notes import Notes, open_notes
from lightning_prune.candidates.replaying import ReplayingRunner
from lightning_prune.candidates.runner import Runner
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.graph.twin import refusing_calls
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation import check_method
from lightning_prune.surgery.compensation.many_plans import Collected

__all__ = ["Measured", "evaluate_candidates"]


@dataclass(frozen=True)
class Measured:
    """Loss and accuracy of candidates, means over all samples.

    Attributes:
        loss: (candidates,) float64.
        accuracy: (candidates,) float64.
    """

    loss: Tensor
    accuracy: Tensor


def evaluate_candidates(
    graph: ChannelGraph,
    candidates: Iterable[Candidate | Mapping[str, Tensor]],
    batches: Iterable[Any],
    *,
    evaluate: Evaluate = classification,
    compensate: str = "none",
    compensate_batches: Sequence[Any] = (),
    memory: Memory | None = None,
    resume: str | Path | None = None,
    own_data: bool = False,
) -> Measured:
    """Measure loss and accuracy of many sub-networks of one model.

    A candidate computes what the model would compute in evaluation mode once its channels are pruned. To be fast,
    what comes before the first difference from the model is computed once per batch, candidates that keep few channels
    run with smaller tensors, and candidates that differ at the same place are computed together if batches are small.
    Each shortcut is tried out first; where it does not give what the plain run gives, the plain run is used. The model
    is not touched: twins of it run. The random state is as it was.

    With ``compensate`` a candidate is what `lightning_prune.prune` with that setting makes of the model. All but
    ``"refit"`` collect what layers are given once for all candidates, so that each costs little more than its runs.

    In a distributed run the ranks share the candidates and all get all results; they must pass the same arguments.

    Args:
        graph: The traced model, pruned already or not; ``graph.model`` is called with the inputs of a batch.
        candidates: Plans, kept channels by group name as for `ChannelGraph.plan`, or `Noise`.
        batches: The batches, on the device of the model; by default pairs of inputs and labels.
        evaluate: Given a twin of the model and a batch, returns loss and accuracy as means over its samples.
        compensate: ``"none"``, ``"statistics"``, ``"fold"`` or ``"refit"``, as for `lightning_prune.prune`. The
            statistics of copies with noise follow it, whichever of these it is.
        compensate_batches: The batches that candidates are compensated on, of the kind of ``batches``.
        memory: Keeps what is collected to compensate candidates for the next call with the same network.
        resume: Folder in which results are noted, so that the same call goes on after an interruption. One folder may
            serve several calls: results are found by the model, the batch and the candidate.
        own_data: Whether each rank has batches of its own; each then measures all candidates.

    Returns:
        Loss and accuracy of each candidate.

    Raises:
        ValueError: If there is no such ``compensate`` or nothing to compensate on, the batches or the outputs are not
            those of a classifier and ``evaluate`` is not given, there are no batches, a plan does not fit the model,
            ``evaluate`` runs another model than it is given, what was measured is not finite, a file in ``resume`` is
            damaged, or ``evaluate`` cannot be told from others by what is noted there.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> _ = nn.init.eye_(model[0].weight), nn.init.eye_(model[2].weight)
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> batch = (torch.tensor([[0.0, 5.0], [0.0, 5.0]]), torch.tensor([1, 1]))
        >>> evaluate_candidates(graph, [{}, {"0": torch.tensor([0, 2])}], [batch]).accuracy
        tensor([1., 0.], dtype=torch.float64)
    """
    collected = Collected()
    if memory is not None and compensate in ("statistics", "fold"):
        collected = memory.of(graph.model, compensate_batches, evaluate)
    make_runner = _runner_for(compensate, compensate_batches, collected)
    planned = [_planned(graph, candidate) for candidate in candidates]
    ranks = _Ranks.current()
    notes = open_notes(resume, ranks.this, planned)
    sums = _Sums(len(planned))
    jobs: list[Job] | None = None

    with undisturbed(graph.model) as twin, progress(f"Measuring {len(planned)} sub-networks") as work:
        graph_of_twin = replace(graph, model=twin.model)
        runner = make_runner(graph_of_twin, planned, of_twin(evaluate, twin))
        notes.begin_run(graph.model, evaluate, compensate, compensate_batches)
        for batch in batches:
            if jobs is None:
                with refusing_calls(graph.model):
                    jobs = runner.jobs(batch)
                jobs = jobs if own_data else share(jobs, ranks.this, ranks.count)
                work.total = len(jobs) * length_hint(batches) or None
            runner.begin(batch)
            notes.begin_batch(batch)
            samples = samples_in(batch)
            for job in jobs:
                entries = _noted_or_measured(job, notes, runner, samples)
                sums.add(job, entries, samples)
                work.advance()

    if jobs is None:
        raise ValueError("There are no batches to measure the candidates on.")
    if ranks.count > 1:
        sums.add_other_ranks(graph.model)
    measured = sums.means()
    refuse_not_finite(graph.model, batches, measured.loss, measured.accuracy)
    return measured


def _planned(graph: ChannelGraph, candidate: Candidate | Mapping[str, Tensor]) -> Candidate:
    """Return a candidate as it is, or the plan for kept channels by group name."""
    if isinstance(candidate, PruningPlan | Noise):
        return candidate
    return graph.plan(candidate)


def _runner_for(method: str, batches: Sequence[Any], collected: Collected) -> Callable[..., Runner]:
    """Return what makes the runner of candidates that are compensated in some way."""
    check_method(method)
    if method == "none":
        return ReplayingRunner
    if len(batches) == 0:
        raise ValueError(f"compensate={method!r} looks at data: give `compensate_batches`, or compensate='none'.")
    return partial(CompensatingRunner, method=method, batches=batches, collected=collected)


def _noted_or_measured(job: Job, notes: Notes, runner: Runner, samples: int) -> list[Entry]:
    """Return what the members of a job reach on a batch, which is measured and noted unless it is known."""
    known = notes.find(job)
    if known is not None:
        return known
    measured = runner.measure(job)
    entries = [Entry(one.loss, one.accuracy, samples) for one in measured]
    notes.add(job, entries)
    return entries


class _Sums:
    """Sums over samples, of the losses and the accuracies of each candidate.

    Args:
        candidates: How many candidates there are.
    """

    def __init__(self, candidates: int) -> None:
        self._rows = torch.zeros(3, candidates, dtype=torch.float64)  # of losses, of accuracies, of samples

    def add(self, job: Job, entries: Sequence[Entry], samples: int) -> None:
        """Add the means that the members of a job have reached on a batch of that many samples."""
        means = [[entry.loss, entry.accuracy, 1.0] for entry in entries]
        columns = torch.tensor(means, dtype=torch.float64).t()  # (3, members)
        self._rows[:, list(job.members)] += columns * samples

    def add_other_ranks(self, model: nn.Module) -> None:
        """Add what the other ranks have summed, by way of the device of the model."""
        first = next(iter(named_tensors(model).values()))
        shared = self._rows.to(first.device)
        distributed.all_reduce(shared)
        self._rows = shared.cpu()

    def means(self) -> Measured:
        losses, accuracies, samples = self._rows
        return Measured(losses / samples, accuracies / samples)


@dataclass(frozen=True)
class _Ranks:
    """The number of this rank, and how many there are."""

    this: int
    count: int

    @classmethod
    def current(cls) -> "_Ranks":
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls(0, 1)
