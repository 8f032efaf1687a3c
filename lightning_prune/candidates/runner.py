"""Run candidates on one batch after the other."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.candidates.jobs import Job, Planner
from lightning_prune.candidates.layout import fold, foldable, put_channels_last
from lightning_prune.candidates.measures import (
    Evaluate,
    as_numbers,
    classification,
    examples_in,
    labelled,
    per_example,
)
from lightning_prune.candidates.replay import Replay, observe
from lightning_prune.candidates.variants import Candidate, Noise, input_masks, masked, noisy, plain_readers
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors, substituting_tensors
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import pruned_tensors
from lightning_prune.surgery.batch_norm import recalibrate

__all__ = ["Runner"]

_FULL = {"cpu": 128, "cuda": 2048}  # examples in a batch from which more of them do not make a device faster
_ENOUGH = 8  # examples to tell whether two networks compute the same
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}  # of a loss that was computed in another way
_LOW_PRECISION = 2e-2  # the same for half precision, and 1e-3 where a GPU multiplies in TF32

Numbers = tuple[float, float]


class Runner:
    """Run candidates on batches, with the shortcuts that have been seen to work.

    Args:
        graph: The traced model, in evaluation mode and without gradients as long as the runner lives.
        candidates: The candidates.
        evaluate: Given the model and a batch, returns loss and accuracy.
        recalibration: Batches to estimate the statistics of batch normalisation from, for each candidate.
    """

    def __init__(
        self, graph: ChannelGraph, candidates: Sequence[Candidate], evaluate: Evaluate, recalibration: Sequence[Any]
    ) -> None:
        self.graph, self.candidates = graph, candidates
        self.evaluate, self.recalibration = evaluate, recalibration
        self._works: dict[tuple[str, int, int], bool] = {}  # by what `_kind` says
        self._statistics: dict[int, list[Tensor]] = {}  # of batch normalisation, by candidate

    def jobs(self, batch: Any) -> list[Job]:
        """Decide how to run the candidates, from what the model does on a first batch."""
        self.batch, model = batch, self.graph.model
        if self.recalibration:  # statistics of each candidate's own: nothing that candidates have in common
            self.operations: list[Any] = []
            self._trial = _some(batch) if self.evaluate is classification else batch
            result, self._pairs = put_channels_last(model, lambda: foldable(model, self._tried))
            self._know(result)
            return [Job("folded", 0, (member,)) for member in range(len(self.candidates))]
        readers = plain_readers(model)
        with _calls(readers.values()) as calls:
            course = observe(self._unchanged, named_tensors(model))
        # A weight that is read otherwise than by calling its layer is not masked by a mask on what the layer is given.
        self.readers = {name: module for name, module in readers.items() if calls[module] == course.reads[name]}
        self.operations = course.operations
        self._know(course.result)
        planner = Planner(self.graph, course, self.readers)
        stack = _FULL.get(next(iter(self.tensors.values())).device.type, 1) // examples_in(batch)
        return planner.jobs(self.candidates, max(1, stack) if self.evaluate is classification else 1)

    def _know(self, result: Any) -> None:
        """Note what the model itself reaches, and its tensors as they are laid out now."""
        self._loss, self.tensors = as_numbers(result)[0], named_tensors(self.graph.model)

    def begin(self, batch: Any) -> None:
        """Turn to a batch."""
        self.batch = batch
        self._replay = Replay(self._unchanged, self.operations, examples_in(batch))
        self._repeated: tuple[Tensor, Tensor] | None = None

    def measure(self, job: Job) -> list[Numbers]:
        """Return loss and accuracy of the members of a job on the batch."""
        if job.way == "plain":
            return [self._plain(member) for member in job.members]
        short = self._attempt(job) if self._works.get(self._kind(job), True) else None
        if short is not None:
            return short
        if job.way == "stacked":
            single = [Job("masked", job.boundary, (member,)) for member in job.members]
            return [numbers for each in single for numbers in self.measure(each)]
        return [self._plain(member) for member in job.members]

    def _attempt(self, job: Job) -> list[Numbers] | None:
        """Take the shortcut; None, and never again, if it fails or at first differs from the plain run."""
        key = self._kind(job)
        try:
            short = self._short(job)
            works = key in self._works or self._agrees(job, short)
        except Exception:  # whatever a model may raise that does not do the same each time; the plain run raises again
            works = False
        if not works and job.way not in ("folded", "stacked"):
            warnings.warn(
                f"{type(self.graph.model).__name__} does not repeat the same operations, so that nothing can be reused "
                "from one candidate to the next; they are measured one by one, which takes longer.",
                stacklevel=2,
            )
        if not works or any(loss != self._loss for loss, _ in short):  # else it is too soon to tell
            self._works[key] = works
        return short if works else None

    def _kind(self, job: Job) -> tuple[str, int, int]:
        """Return what jobs have in common that are tried out by the first of them."""
        # What is repeated in a stack is told from the rest by its size, which may be that of other tensors by chance.
        return job.way, job.boundary, examples_in(self.batch) if job.way == "stacked" else 0

    def _agrees(self, job: Job, short: list[Numbers]) -> bool:
        """Tell whether the plain run gives the same for the member that differs most from the model."""
        if job.way == "folded":
            return self._folding_agrees(job.members[0])
        effects = [abs(loss - self._loss) for loss, _ in short]
        most = effects.index(max(effects))
        return self._close(short[most][0], self._plain(job.members[most])[0])

    def _folding_agrees(self, member: int) -> bool:
        """Tell whether a candidate computes the same with its normalisations as part of its convolutions."""
        with self._standing_in("sliced", self.candidates[member]):
            self._recalibrate(member)
            plain = as_numbers(self._tried())[0]
            fold(self._pairs)
            return self._close(as_numbers(self._tried())[0], plain)

    def _unchanged(self) -> Any:
        return self.evaluate(self.graph.model, self.batch)

    def _tried(self) -> Any:
        return self.evaluate(self.graph.model, self._trial)

    def _close(self, one: float, other: float) -> bool:
        kinds = {tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()}
        tolerance = max((_TOLERANCE.get(kind, _LOW_PRECISION) for kind in kinds), default=0.0)
        on_gpu = any(tensor.is_cuda for tensor in self.tensors.values())
        tolerance = max(tolerance, 1e-3) if on_gpu and torch.float64 not in kinds else tolerance
        return one == other or (one != one and other != other) or abs(one - other) <= tolerance * (1 + abs(other))

    # -- the ways ---------------------------------------------------------------------------------------------------

    def _plain(self, member: int) -> Numbers:
        candidate = self.candidates[member]
        inexact = isinstance(candidate, PruningPlan) and any(
            self.graph.group(n).not_mask_exact for n in candidate.groups
        )
        with self._standing_in("sliced" if inexact or self.recalibration else "masked", candidate):
            if self.recalibration:
                self._recalibrate(member)
            return as_numbers(self._unchanged())

    def _folded(self, member: int) -> Numbers:
        """Run a candidate with its normalisations as part of its convolutions, once their statistics are known."""
        with self._standing_in("sliced", self.candidates[member]):
            self._recalibrate(member)
            fold(self._pairs)
            return as_numbers(self._unchanged())

    def _recalibrate(self, member: int) -> None:
        """Estimate the statistics of batch normalisation; those of a candidate serve for all batches."""
        if member not in self._statistics:
            recalibrate(self.graph.model, self.recalibration, self.evaluate)
            self._statistics[member] = [buffer.clone() for buffer in _statistics(self.graph.model)]
        for buffer, known in zip(_statistics(self.graph.model), self._statistics[member], strict=True):
            buffer.copy_(known)

    def _short(self, job: Job) -> list[Numbers]:
        if job.way == "folded":
            return [self._folded(job.members[0])]
        self._replay.advance(job.boundary)
        if job.way == "stacked":
            return self._stacked(job)
        with self._standing_in(job.way, self.candidates[job.members[0]]):
            return [as_numbers(self._replay.run())]

    def _stacked(self, job: Job) -> list[Numbers]:
        """Run several masked candidates as one batch."""
        count, model = len(job.members), self.graph.model
        inputs, labels = labelled(self.batch)
        if self._repeated is None or len(self._repeated[0]) != count * len(inputs):
            self._repeated = torch.cat([inputs] * count), torch.cat([labels] * count)
        inputs, labels = self._repeated
        plans = [cast(PruningPlan, self.candidates[member]) for member in job.members]
        masks = input_masks(self.graph, plans, self.tensors)
        handles = [self.readers[name].register_forward_pre_hook(_masking(mask)) for name, mask in masks.items()]
        try:
            losses, hits = self._replay.run(lambda: per_example(model(inputs), labels), count)
        finally:
            for handle in handles:
                handle.remove()
        means = torch.stack([losses, hits]).unflatten(1, (count, -1)).mean(2)
        return [(loss, accuracy) for loss, accuracy in means.t().tolist()]

    @contextmanager
    def _standing_in(self, way: str, candidate: Candidate) -> Iterator[None]:
        if isinstance(candidate, Noise):
            found = noisy(self.graph, candidate, self.tensors)
        elif way == "sliced":
            found = pruned_tensors(self.graph.model, candidate)
        else:
            found = masked(self.graph, candidate, self.tensors)
        stand_ins = {id(self.tensors[name]): tensor for name, tensor in found.items()}
        with substituting_tensors(
            self.graph.model, stand_ins, training=False, wrap_forward=lambda module, forward: forward
        ):
            yield


@contextmanager
def _calls(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Count how often modules are called."""
    calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: Any) -> None:
        calls[module] += 1

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _statistics(model: nn.Module) -> list[Tensor]:
    """Return the running statistics of all batch normalisations, as they are now."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def _some(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the first examples of a batch."""
    inputs, labels = labelled(batch)
    return inputs[:_ENOUGH], labels[:_ENOUGH]


def _masking(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return a hook that zeroes what the copies of a batch do not read.

    Args:
        mask: (copies, inputs).
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        copies = args[0].unflatten(0, (len(mask), -1))
        axis = copies.dim() - 1 if isinstance(module, nn.Linear) else 2
        shape = [1] * copies.dim()
        shape[0], shape[axis] = mask.shape
        return ((copies * mask.view(shape)).flatten(0, 1), *args[1:])

    return hook
