"""Measure many candidates on batches; ranks share the work, and what has been measured is noted."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.candidates.jobs import Job, share
from lightning_prune.candidates.journal import Entry, Journal, description, digest_of
from lightning_prune.candidates.measures import Evaluate, classification, examples_in
from lightning_prune.candidates.runner import Runner
from lightning_prune.candidates.variants import Candidate, Noise, digest
from lightning_prune.compiled import as_written
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors, substituting_tensors
from lightning_prune.progress import progress
from lightning_prune.pruning_plan import PruningPlan

__all__ = ["Measured", "alone", "evaluate_candidates"]


@dataclass(frozen=True)
class Measured:
    """Loss and accuracy of candidates, means over all examples.

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
    recalibrate: Sequence[Any] = (),
    resume: str | Path | None = None,
    own_data: bool = False,
) -> Measured:
    """Measure loss and accuracy of many sub-networks of one model.

    A candidate computes what the model would compute in evaluation mode once its channels are removed. To be fast,
    what comes before the first difference from the model is computed once per batch, candidates that lose much run
    with smaller tensors, and candidates that differ at the same place are computed together if batches are small.
    Each shortcut is tried out first; where it does not give what the plain run gives, the plain run is used. The model
    is left exactly as it was: mode, tensors, gradients and random state.

    In a distributed run the ranks share the candidates and all get all results; they must pass the same arguments.

    Args:
        graph: The traced model, pruned already or not; ``graph.model`` is called with the inputs of a batch.
        candidates: Plans, channels that stay by group name as for `ChannelGraph.plan`, or `Noise`.
        batches: The batches, on the device of the model; by default pairs of inputs and labels.
        evaluate: Given the model and a batch, returns loss and accuracy as means over its examples.
        recalibrate: Batches to estimate the statistics of batch normalisation from, for each candidate anew; none to
            keep the statistics of the model.
        resume: Folder in which results are noted, so that the same call goes on after an interruption. One folder may
            serve several calls: results are found by what the model, the batch and the candidate hold.
        own_data: Whether each rank has batches of its own; each then measures all candidates.

    Returns:
        Loss and accuracy of each candidate.

    Raises:
        ValueError: If the batches or the outputs are not those of a classifier and ``evaluate`` is not given, there
            are no batches, a plan does not fit the model, a file in ``resume`` is damaged, or ``evaluate`` cannot be
            told from others by what is noted there.

    Example:
        >>> from lightning_prune import trace
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> _ = nn.init.eye_(model[0].weight), nn.init.eye_(model[2].weight)
        >>> graph = trace(model, torch.zeros(1, 2))
        >>> batch = (torch.tensor([[0.0, 5.0], [0.0, 5.0]]), torch.tensor([1, 1]))
        >>> evaluate_candidates(graph, [{}, {"0": torch.tensor([0, 2])}], [batch]).accuracy
        tensor([1., 0.], dtype=torch.float64)
    """
    plans = [each if isinstance(each, PruningPlan | Noise) else graph.plan(each) for each in candidates]
    rank, world = _ranks()
    notes = _Notes(resume, rank, plans)
    sums = torch.zeros(3, len(plans), dtype=torch.float64)  # of losses, of accuracies, of examples
    jobs: list[Job] | None = None
    with _undisturbed(graph.model), progress(f"Measuring {len(plans)} sub-networks") as work:
        runner = Runner(graph, plans, evaluate, recalibrate)
        notes.about(graph.model, evaluate, recalibrate)
        for batch in batches:
            if jobs is None:
                jobs = runner.jobs(batch)
                jobs = jobs if own_data else share(jobs, rank, world)
                work.total = len(jobs) * length_hint(batches) or None
            runner.begin(batch)
            notes.turn_to(batch)
            for job in jobs:
                sums[:, list(job.members)] += _measured(runner, job, notes, examples_in(batch))
                work.advance()
    if jobs is None:
        raise ValueError("There are no batches to measure the candidates on.")
    sums = _over_ranks(sums, graph.model)
    return Measured(sums[0] / sums[2], sums[1] / sums[2])


def _measured(runner: Runner, job: Job, notes: "_Notes", examples: int) -> Tensor:
    """Return (3, members) sums over the examples of a batch: of the losses, of the accuracies, and their number."""
    entries = notes.find(job)
    if entries is None:
        entries = [Entry(loss, accuracy, examples) for loss, accuracy in runner.measure(job)]
        notes.add(job, entries)
    rows = torch.tensor([[entry.loss, entry.accuracy, 1.0] for entry in entries], dtype=torch.float64)
    return rows.t() * examples


class _Notes:
    """Note what has been measured, if there is a folder for it, under what it depends on."""

    def __init__(self, folder: str | Path | None, rank: int, candidates: Sequence[Candidate]) -> None:
        self._journal = None if folder is None else Journal(folder, rank)
        self._candidates = candidates if folder is None else [digest(candidate) for candidate in candidates]
        self._run = self._batch = ""

    def about(self, model: nn.Module, evaluate: Evaluate, recalibrate: Sequence[Any]) -> None:
        if self._journal is not None:
            tensors = list(named_tensors(model).items())
            self._run = digest_of((repr(model), tensors, description(evaluate), list(recalibrate)))

    def turn_to(self, batch: Any) -> None:
        if self._journal is not None:
            self._batch = digest_of(batch)

    def find(self, job: Job) -> list[Entry] | None:
        """Return what is known of the members of a job; None unless all are."""
        if self._journal is None:
            return None
        found = [self._journal.entries.get(key) for key in self._keys(job)]
        return None if None in found else found  # type: ignore[return-value]

    def add(self, job: Job, entries: list[Entry]) -> None:
        if self._journal is not None:
            self._journal.add(dict(zip(self._keys(job), entries, strict=True)))

    def _keys(self, job: Job) -> list[str]:
        return [digest_of((self._run, self._batch, self._candidates[member])) for member in job.members]


def _ranks() -> tuple[int, int]:
    """Return the number of this rank and of all ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _over_ranks(sums: Tensor, model: nn.Module) -> Tensor:
    if _ranks()[1] == 1:
        return sums
    shared = sums.to(next(iter(named_tensors(model).values())).device)
    distributed.all_reduce(shared)
    return shared.cpu()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, on copies of its buffers; give the random state back as it was."""
    tensors = named_tensors(model).values()
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.inference_mode(False), torch.no_grad(), as_written(), torch.random.fork_rng(devices):
        copies = {id(tensor): tensor.clone() for tensor in tensors if not isinstance(tensor, nn.Parameter)}
        with substituting_tensors(model, copies, training=False, wrap_forward=alone):
            yield


def alone(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward function of a module that does not wait for other ranks, which run other candidates.

    Args:
        module: Any module.
        forward: Its own forward function, which normalisation across ranks is not left.
    """
    return partial(_BatchNorm.forward, module) if isinstance(module, nn.SyncBatchNorm) else forward
