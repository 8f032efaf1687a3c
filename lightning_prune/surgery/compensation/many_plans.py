"""Compensation for many plans of one model: what does not depend on the plan is collected once."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan, plan_in_force
from lightning_prune.surgery.compensation.compensating import check_finite, check_method, folded_by, handlers_of
from lightning_prune.surgery.compensation.folding import InputMoments, KnownMoments, fold
from lightning_prune.surgery.compensation.heads import FoundHeads, HeadMoments
from lightning_prune.surgery.compensation.lockstep import Lockstep, MakeNetwork, PrunedLanes
from lightning_prune.surgery.compensation.normalisation import Statistics, follow
from lightning_prune.surgery.compensation.operators import Normalisation, Step
from lightning_prune.surgery.compensation.runs import Watch
from lightning_prune.surgery.compensation.survey import Survey, names_of, survey
from lightning_prune.surgery.compensation.turning import turn
from lightning_prune.surgery.compensation.work import Work
from lightning_prune.surgery.compensation_report import CompensationReport
from lightning_prune.surgery.pruning import kept_positions

__all__ = ["Collected", "Compensator"]


class Collected:
    """What is collected of a network and of batches, whatever is pruned; later compensators add to it, and find it."""

    def __init__(self) -> None:
        self.survey: Survey | None = None
        self.moments: KnownMoments = {}
        self.heads = FoundHeads()
        self.before: _Before | None = None


class Compensator:
    """Compensate for one plan after the other, as `compensation` does, from what is collected of the model once.

    Second moments of what layers are given, and statistics of what is normalised, are those of the network before the
    prune, whatever the plan. What is left to do for each is a small system of equations for each layer, and a pass in
    which the statistics follow. How far layers are from what they computed is not measured.

    Args:
        model: The model, which must not change as long as this is in use.
        method: ``"statistics"`` or ``"fold"``.
        batches: What the model is run on.
        make: Makes the networks that are run.
        collected: What was collected before, of the same network on the same batches.

    Raises:
        ValueError: If there is no batch, or what layers return is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        batches: Sequence[Any],
        make: MakeNetwork,
        collected: Collected | None = None,
    ) -> None:
        check_method(method)
        if not batches:
            raise ValueError(f"There are no batches to compensate by {method!r} with.")
        self._model = model
        self._method = method
        self._batches = batches
        collected = collected or Collected()
        if collected.survey is None or collected.before is None:
            collected.survey = survey(model, make, batches[0])
            before = _Before(collected.survey)
            before.collect(model, make, batches)
            collected.before = before
        self._survey = collected.survey
        self._before = collected.before
        self._moments = InputMoments(model, make, batches, collected.moments)
        self._heads = HeadMoments(model, make, batches, collected.heads)

    def compensate(
        self, plan: PruningPlan, tensors: dict[str, Tensor], make: MakeNetwork, unchanged: Collection[str] = ()
    ) -> set[str]:
        """Write to the tensors of a pruned network what compensates for the prune.

        Args:
            plan: The channels to keep, about the original model; none where weights have changed but no channels.
            tensors: Those of the pruned network, by name, as `stand_ins` returns them.
            make: Makes the network that is run.
            unchanged: Normalisations, by the names of their means, that are given what they were given before.

        Returns:
            The names of the tensors that were written to.
        """
        earlier = plan_in_force(self._model) or PruningPlan()
        in_force = plan.after(earlier)
        kept = kept_positions(in_force, earlier)
        work = Work(self._model, plan, kept, tensors, self._survey, CompensationReport(self._method))
        handlers = handlers_of(work, self._method)
        if self._method != "statistics" and self._survey.multiplies:
            turn(work, self._heads)
        fold(work, folded_by(handlers), self._moments)
        lanes = self._survey.lanes()
        norms = [name for name in handlers if name in self._survey.norms and name not in unchanged]
        lanes_at = {name: lanes[name] for name in norms}
        lockstep = Lockstep(self._batches, PrunedLanes(in_force, tensors, make).start)
        for name, steps in lockstep.meetings(lanes_at):
            self._follow(work, name, steps)
            del steps  # which keep activations
        return work.changed

    def _follow(self, work: Work, name: str, steps: Sequence[Step]) -> None:
        """Let the statistics of one normalisation follow what it is given."""
        norm = steps[0] if steps else None
        shapes = [_positions(step.x) for step in steps]
        if not isinstance(norm, Normalisation) or shapes != self._before.shapes[name]:
            return
        after = Statistics()
        for step in steps:
            after.add(step.x)
        before = self._before.statistics[name]
        if name in work.kept:
            before = before.of_some(work.kept_along(name, 0))
        follow(work, name, norm, before, after)


class _Before:
    """Statistics of what is normalised in the network before the prune.

    Args:
        found: Which layers run.

    Attributes:
        statistics: Those of each normalisation, by the name of its running mean.
        shapes: How many samples and positions it is given, batch by batch.
    """

    def __init__(self, found: Survey) -> None:
        self._lanes = found.lanes()
        self.statistics = {name: Statistics() for name in found.norms}
        self.shapes: dict[str, list[Size]] = {name: [] for name in found.norms}
        self._batch = 0

    @torch.no_grad()
    def collect(self, model: nn.Module, make: MakeNetwork, batches: Sequence[Any]) -> None:
        """Run the batches.

        Args:
            model: The model.
            make: Makes the network that is run.
            batches: The batches.
        """
        tensors = named_tensors(model)
        run = make(tensors, None)
        with Watch(names_of(tensors), self._note):
            for number, batch in enumerate(batches):
                self._batch = number
                run(batch)

    def _note(self, name: str, step: Step, proceed: Callable[[], Any]) -> Any:
        if name in self.statistics and len(self.shapes[name]) == self._batch < self._lanes[name]:
            self.statistics[name].add(step.x)
            self.shapes[name].append(_positions(step.x))
        output = proceed()
        check_finite(name, output)
        return output


def _positions(x: Tensor) -> Size:
    """Return the shape of what is normalised, but for the channels."""
    return x.shape[:1] + x.shape[2:]
