"""Runner of candidates: it takes the shortcut of a job where that has been seen to give what the plain run gives.

How candidates are run is not decided here but in `jobs`, and the shortcuts themselves are those of the two kinds of
runners, `ReplayingRunner` and `CompensatingRunner`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.candidates.candidate import Candidate
from lightning_prune.candidates.isolation import of_twin
from lightning_prune.candidates.jobs import Job, Way
from lightning_prune.candidates.measures import Evaluate, Measurement, as_measurement
from lightning_prune.graph.adapting import adapt
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.twin import Twin
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

__all__ = ["Runner", "Shortcut"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}  # of a loss that was computed in another way
_LOW_PRECISION = 2e-2  # the same for half precision
_TF32 = 1e-3  # the same where a GPU multiplies in TF32


class Shortcut(NamedTuple):
    """What jobs have in common that are tried out by the first of them.

    Attributes:
        way: How they are run.
        boundary: From which operation on.
        samples: Number of samples in the batch, where that makes a difference; otherwise 0.
    """

    way: Way
    boundary: int
    samples: int = 0


class Runner(ABC):
    """Run candidates on batches, with the shortcuts that have been seen to work.

    Args:
        graph: A twin of the traced model, in evaluation mode and without gradients as long as the runner lives.
        candidates: The candidates.
        evaluate: Given the model and a batch, returns loss and accuracy.
    """

    def __init__(self, graph: ChannelGraph, candidates: Sequence[Candidate], evaluate: Evaluate) -> None:
        self.graph = graph
        self.model = graph.model
        self.candidates = candidates
        self.evaluate = evaluate
        self.batch: Any = None
        self.tensors = graph.tensors()
        self.loss_of_model = 0.0
        self._works: dict[Shortcut, bool] = {}

    @abstractmethod
    def jobs(self, batch: Any) -> list[Job]:
        """Decide how to run the candidates, from what the model does on a first batch."""

    @abstractmethod
    def run_plainly(self, member: int) -> Measurement:
        """Run one candidate without any shortcut."""

    @abstractmethod
    def run_shortcut(self, job: Job) -> list[Measurement]:
        """Run the members of a job in the way that it says."""

    @abstractmethod
    def agrees(self, job: Job, measured: Sequence[Measurement]) -> bool:
        """Tell whether the plain run gives what a shortcut has given."""

    def begin(self, batch: Any) -> None:
        """Turn to a batch."""
        self.batch = batch

    def measure(self, job: Job) -> list[Measurement]:
        """Return loss and accuracy of the members of a job on the batch."""
        shortcut = self.shortcut_of(job)
        if job.way is not Way.PLAIN and self._works.get(shortcut, True):
            measured = self._try(job, shortcut)
            if measured is not None:
                return measured
        return self.fall_back(job)

    def shortcut_of(self, job: Job) -> Shortcut:
        """Return what a job is tried out for."""
        return Shortcut(job.way, job.boundary)

    @abstractmethod
    def note_failure(self, job: Job) -> None:
        """Tell the user, where that is of use, that a shortcut does not work."""

    def fall_back(self, job: Job) -> list[Measurement]:
        """Measure the members of a job whose shortcut does not work."""
        return [self.run_plainly(member) for member in job.members]

    def _try(self, job: Job, shortcut: Shortcut) -> list[Measurement] | None:
        """Take a shortcut; None, and never again, if it fails or at first differs from the plain run."""
        try:
            measured = self.run_shortcut(job)
            works = shortcut in self._works or self.agrees(job, measured)
        except Exception:  # whatever a model may raise that does not do the same each time; the plain run raises again
            works = False
        if not works:
            self._works[shortcut] = False
            self.note_failure(job)
            return None
        if any(one.loss != self.loss_of_model for one in measured):  # else it is too soon to tell
            self._works[shortcut] = True
        return measured

    # -- what the kinds of runners share ---------------------------------------------------------------------------

    def note_loss(self, result: Any) -> None:
        """Note what the model itself reaches."""
        self.loss_of_model = as_measurement(result).loss

    def evaluate_model(self) -> Any:
        """Run the model, with whatever stands in for its tensors, on the batch; to be called while `standing_in`."""
        return self.evaluate(self.model, self.batch)

    def are_close(self, loss: float, plain: float) -> bool:
        """Tell whether a loss is what the plain run gives, but for rounding."""
        both_are_nan = loss != loss and plain != plain
        if loss == plain or both_are_nan:
            return True
        return abs(loss - plain) <= self._tolerance() * (1 + abs(plain))

    def _tolerance(self) -> float:
        tensors = self.tensors.values()
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        tolerances = [_TOLERANCE.get(dtype, _LOW_PRECISION) for dtype in dtypes]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if on_gpu and torch.float64 not in dtypes:
            tolerances.append(_TF32)
        return max(tolerances, default=0.0)

    @contextmanager
    def standing_in(self, stand_ins: Mapping[str, Tensor], plan: PruningPlan | None = None) -> Iterator[None]:
        """Let a twin be the model for a while, which has other tensors in the place of some, and shares the rest.

        Each pass has one of its own, since it may not come to its end.

        Args:
            stand_ins: The tensors, by the name of those that they stand in for.
            plan: What has been pruned from them, if that makes the difference.
        """
        model, evaluate = self.model, self.evaluate
        by_id = {id(tensor): stand_ins.get(name, tensor) for name, tensor in self.tensors.items()}
        twin = Twin(model, by_id)
        if plan is not None:
            adapt(twin.model, plan.after(plan_in_force(model)))
        self.model, self.evaluate = twin.model, of_twin(evaluate, twin)
        try:
            yield
        finally:
            self.model, self.evaluate = model, evaluate
