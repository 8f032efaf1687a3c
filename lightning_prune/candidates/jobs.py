"""Jobs: how candidates are run, from which operation on, and which of them together.

A `Planner` decides by what each way costs. It runs nothing; a `Runner` does the jobs.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from typing_extensions import override

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.operator_trace import OperatorTrace
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.planning.cost import CostModel
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery.masks import in_positions_of_pruned, pruned_channels

__all__ = ["CompensatingPlanner", "Job", "Planner", "Way", "share"]

_WORTH_SLICING = 0.9  # of the FLOPs of the masked network; copying the tensors takes time too


class Way(Enum):
    """A way to run candidates."""

    PLAIN = "plain"
    """The complete forward pass, without any shortcut."""
    MASKED = "masked"
    """From the first difference on, with zeros in the in-channel slices of pruned channels."""
    SLICED = "sliced"
    """From the first difference on, with tensors of the pruned shapes."""
    NOISY = "noisy"
    """From the first difference on, with noise on the weights."""
    STACKED = "stacked"
    """From the first difference on, several candidates as one batch, with masks on the inputs of layers."""
    FOLDED = "folded"
    """As sliced ones, and with batch normalisation folded into convolutions."""


@dataclass(frozen=True)
class Job:
    """Candidates that run together.

    Attributes:
        way: How they are run.
        boundary: Number of operations before the first one that differs from the model.
        members: Their numbers.
        cost: FLOPs, about.
    """

    way: Way
    boundary: int
    members: tuple[int, ...]
    cost: float = 1


class _Kind(NamedTuple):
    """What candidates must have in common to run one after the other."""

    boundary: int
    way: Way


@dataclass(frozen=True)
class _Choice:
    """How one candidate is run; the attributes are those of a `Job`."""

    way: Way
    boundary: int
    cost: float

    @property
    def kind(self) -> _Kind:
        return _Kind(self.boundary, self.way)


class Planner:
    """Decide how to run candidates.

    Args:
        graph: The traced model.
        trace: What the model does in a forward pass, and where it uses its tensors.
        maskable: Names of the weights that a mask on the input of their layer can mask.
    """

    def __init__(self, graph: ChannelGraph, trace: OperatorTrace, maskable: Collection[str]) -> None:
        self._graph = graph
        self._first_uses = trace.first_use
        self._end = len(trace.operations)
        self._maskable = maskable
        self._plan_in_force = plan_in_force(graph.model) or PruningPlan()
        self._starts_of_modules = _first_uses_by_module(trace)
        self._cost_from = cache(self._cost_model_from)

    def jobs(self, candidates: Sequence[Candidate], stack: int) -> list[Job]:
        """Return what is to be run, in the order of the forward pass.

        Args:
            candidates: The candidates.
            stack: How many of them may run in one batch.
        """
        choices = [self._choose(candidate) for candidate in candidates]
        members_by_kind: defaultdict[_Kind, list[int]] = defaultdict(list)
        for member, choice in enumerate(choices):
            members_by_kind[choice.kind].append(member)
        jobs = []
        for kind in sorted(members_by_kind, key=_order_of_jobs):
            members = members_by_kind[kind]
            size = stack if kind.way is Way.STACKED else 1
            cost_of_check = self._cost_of_model  # the first job of its kind is compared with the plain run
            for start in range(0, len(members), size):
                together = tuple(members[start : start + size])
                cost_of_members = sum(choices[member].cost for member in together)
                cost = 1 + cost_of_members + cost_of_check
                jobs.append(Job(kind.way, kind.boundary, together, cost))
                cost_of_check = 0
        return jobs

    def _choose(self, candidate: Candidate) -> _Choice:
        if isinstance(candidate, Noise):
            return self._choose_for_noise(candidate)
        plan = candidate.after(self._plan_in_force)
        zeroed = [(tensor, axis) for tensor, axis, _ in in_positions_of_pruned(self._graph, candidate)]
        masked_from = self._first_use(tensor for tensor, _ in zeroed)
        if masked_from == self._end:  # nothing is pruned, or nothing that is run consumes it
            return _Choice(Way.PLAIN, self._end, self._cost_of_model)

        sliced_from = self._first_use(plan.index())
        cost_of_mask = self._cost_from(masked_from)(self._plan_in_force.widths)
        cost_of_slices = self._cost_from(sliced_from)(plan.widths)
        if not self._is_mask_exact(candidate) or cost_of_slices < _WORTH_SLICING * cost_of_mask:
            return _Choice(Way.SLICED, sliced_from, cost_of_slices)
        stackable = all(tensor in self._maskable for tensor, _ in zeroed)
        columns_alone = all(axis == 1 for _, axis in zeroed)
        way = Way.STACKED if stackable and columns_alone else Way.MASKED
        return _Choice(way, masked_from, cost_of_mask)

    def _choose_for_noise(self, noise: Noise) -> _Choice:
        group = self._graph.group(noise.group)
        first = self._first_use(place.tensor for place in group.out_slices)
        cost = self._cost_from(first)(self._plan_in_force.widths)
        return _Choice(Way.NOISY, first, cost)

    def _is_mask_exact(self, plan: PruningPlan) -> bool:
        """Tell whether masking gives what pruning would give, in all groups that the plan prunes."""
        for name, planned in plan.groups.items():
            prunes = len(pruned_channels(self._graph, name, planned)) > 0
            if prunes and self._graph.group(name).not_mask_exact:
                return False
        return True

    @property
    def _cost_of_model(self) -> float:
        return self._cost_from(0)(self._plan_in_force.widths)

    def _first_use(self, tensors: Iterable[str]) -> int:
        """Return the number of operations before the first one that uses any of some tensors."""
        uses = [self._first_uses[tensor] for tensor in tensors]
        return min(uses, default=self._end)

    def _cost_model_from(self, boundary: int) -> CostModel:
        """Return what is spent from a boundary on; what modules without tensors spend counts always."""
        spent = []
        for term in self._graph.terms["flops"]:
            start = self._starts_of_modules.get(term.module, self._end)
            if start >= boundary:
                spent.append(term)
        behind = replace(self._graph, terms={"flops": spent})
        return CostModel(behind, "flops")


class CompensatingPlanner(Planner):
    """Decide how to run candidates that are compensated, whose tensors are others from the first difference on.

    Args:
        graph: As for `Planner`.
        trace: As for `Planner`.
    """

    def __init__(self, graph: ChannelGraph, trace: OperatorTrace) -> None:
        super().__init__(graph, trace, ())

    @override
    def _choose(self, candidate: Candidate) -> _Choice:
        if isinstance(candidate, Noise):
            noisy = self._choose_for_noise(candidate)
            return replace(noisy, way=Way.FOLDED)
        plan = candidate.after(self._plan_in_force)
        boundary = self._first_use(plan.index())
        if boundary == self._end:
            return _Choice(Way.PLAIN, self._end, self._cost_of_model)
        return _Choice(Way.FOLDED, boundary, self._cost_from(boundary)(plan.widths))


def _order_of_jobs(kind: _Kind) -> tuple[int, str]:
    return kind.boundary, kind.way.value


def _first_uses_by_module(trace: OperatorTrace) -> dict[str, int]:
    """Return the number of operations before the first one that uses a tensor of each module."""
    first: dict[str, int] = {}
    for tensor, operation in trace.first_use.items():
        module = tensor.rpartition(".")[0]
        first[module] = min(operation, first.get(module, operation))
    return first


def share(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """Return the jobs of one rank: runs of neighbours, which have much in common, of about the same cost for each rank.

    Each rank gets one run from the first half and one from the second, counted from the end: an operation may take
    longer in late layers than in early ones.

    Args:
        jobs: All jobs, in the order of the forward pass.
        rank: The number of the rank.
        world: How many ranks there are.
    """
    runs = 2 * world
    ends = list(accumulate(job.cost for job in jobs))
    shared = []
    for job, end in zip(jobs, ends, strict=True):
        middle = (end - job.cost / 2) / ends[-1]  # of the job, as a fraction of all cost
        run = int(middle * runs)
        if min(run, runs - 1 - run) == rank:
            shared.append(job)
    return shared
