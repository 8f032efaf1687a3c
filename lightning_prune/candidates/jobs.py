"""How to run candidates: from which operation on, with zeros or with smaller tensors, and which of them together."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from lightning_prune.candidates.replay import Course
from lightning_prune.candidates.variants import Candidate, Noise
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery.masks import in_positions_of_pruned, pruned_channels

__all__ = ["Job", "Planner", "share"]

_WORTH_SLICING = 0.9  # of the operations that a mask leaves to do; copying the tensors takes time too


@dataclass(frozen=True)
class Job:
    """Candidates that run together.

    Attributes:
        way: ``"plain"``, ``"masked"``, ``"sliced"``, ``"noisy"``, ``"stacked"`` for several masked ones in a batch, or
            ``"folded"`` for sliced ones with statistics of their own.
        boundary: Number of operations before the first one that differs from the model.
        members: Their numbers.
        cost: FLOPs, about.
    """

    way: str
    boundary: int
    members: tuple[int, ...]
    cost: float = 1


class Planner:
    """Decide how to run candidates.

    Args:
        graph: The traced model.
        course: What the model does.
        readers: The layers of which a mask on the input does what zeros in the weight do, by the name of the weight.
    """

    def __init__(self, graph: ChannelGraph, course: Course, readers: Collection[str]) -> None:
        self.graph, self.first_read, self.end = graph, course.first_read, len(course.operations)
        self.before = plan_in_force(graph.model) or PruningPlan()
        self.readers = readers
        self._begin: dict[str, int] = {}  # of the modules that have tensors
        for name, step in course.first_read.items():
            module = name.rpartition(".")[0]
            self._begin[module] = min(step, self._begin.get(module, self.end))
        self._cost_behind = cache(self._cost_model)

    def jobs(self, candidates: Sequence[Candidate], stack: int) -> list[Job]:
        """Return what is to be run, in the order of the forward pass.

        Args:
            candidates: The candidates.
            stack: How many of them may run in one batch.
        """
        together = defaultdict(list)
        for number, candidate in enumerate(candidates):
            boundary, way, cost = self._way(candidate)
            together[boundary, way].append((number, cost))
        jobs = []
        for (boundary, way), found in sorted(together.items()):
            size = stack if way == "stacked" else 1
            check = self._cost_behind(0)(self.before.widths)  # the first of its kind is compared with the plain run
            for at in range(0, len(found), size):
                members, costs = zip(*found[at : at + size], strict=True)
                jobs.append(Job(way, boundary, members, 1 + sum(costs) + check))
                check = 0
        return jobs

    def _way(self, candidate: Candidate) -> tuple[int, str, float]:
        """Return the boundary, the way to run a candidate, and what that costs."""
        now = self.before.widths
        if isinstance(candidate, Noise):
            first = self._first(part.tensor for part in self.graph.group(candidate.group).out_slices)
            return first, "noisy", self._cost_behind(first)(now)
        plan = candidate.after(self.before)
        losing = [name for name, group in candidate.groups.items() if len(pruned_channels(self.graph, name, group))]
        read = [(name, axis) for name, axis, _ in in_positions_of_pruned(self.graph, candidate)]
        masked, sliced = self._first(name for name, _ in read), self._first(plan.index())
        if masked == self.end:  # nothing leaves, or nothing that is run reads it
            return self.end, "plain", self._cost_behind(0)(now)
        inexact = any(self.graph.group(name).not_mask_exact for name in losing)
        cost_masked, cost_sliced = self._cost_behind(masked)(now), self._cost_behind(sliced)(plan.widths)
        if inexact or cost_sliced < _WORTH_SLICING * cost_masked:
            return sliced, "sliced", cost_sliced
        stackable = all(name in self.readers and axis == 1 for name, axis in read)
        return masked, "stacked" if stackable else "masked", cost_masked

    def _first(self, names: Iterable[str]) -> int:
        return min((self.first_read[name] for name in names), default=self.end)

    def _cost_model(self, boundary: int) -> CostModel:
        """Return what is spent behind a boundary; what modules without tensors spend counts always."""
        flops = [term for term in self.graph.terms["flops"] if self._begin.get(term.module, self.end) >= boundary]
        return CostModel(replace(self.graph, terms={"flops": flops}), "flops")


def share(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """Return the jobs of one rank: runs of neighbours, which have much in common, of about the same cost for each rank.

    Each rank gets one run from the first half and one from the second, counted from the end: an operation may take
    longer in late layers than in early ones.
    """
    ends = list(accumulate(job.cost for job in jobs))
    runs = [int((end - job.cost / 2) / ends[-1] * 2 * world) for job, end in zip(jobs, ends, strict=True)]
    return [job for job, run in zip(jobs, runs, strict=True) if min(run, 2 * world - 1 - run) == rank]
