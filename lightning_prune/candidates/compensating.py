"""Runner of candidates that are compensated before they are measured.

What does not depend on the candidate is collected once. The rest is done for each of them from its first difference on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.isolation import of_twin
from lightning_prune.candidates.jobs import CompensatingPlanner, Job, Way
from lightning_prune.candidates.layout import FoldablePair, fold, foldable, put_channels_last
from lightning_prune.candidates.measures import Evaluate, Measurement, as_measurement, classification, labelled
from lightning_prune.candidates.operator_trace import OperatorTrace, trace_operators
from lightning_prune.candidates.replay import Replay
from lightning_prune.candidates.replaying import ReplayingRunner
from lightning_prune.candidates.stand_ins import noisy_tensors
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.nested import first_length
from lightning_prune.graph.neutral import unfused_attention
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.graph.twin import Twin
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import pruned_tensors
from lightning_prune.surgery.compensation.compensating import compensation_by
from lightning_prune.surgery.compensation.copies import bring_in_step, stand_ins
from lightning_prune.surgery.compensation.lockstep import MakeNetwork, Network
from lightning_prune.surgery.compensation.many_plans import Collected, Compensator

__all__ = ["CompensatingRunner"]

_ENOUGH_SAMPLES = 8  # to tell whether two networks compute the same
_REMEMBERED = 2**30  # bytes of compensated tensors that are kept from one batch to the next


class CompensatingRunner(ReplayingRunner):
    """Run candidates one by one, each compensated, and in the layout that is fastest.

    Args:
        graph: As for `Runner`.
        candidates: As for `Runner`.
        evaluate: As for `Runner`.
        method: As for `lightning_prune.prune`, but ``"none"``.
        batches: What candidates are compensated on.
        collected: What was collected before, of the same model on these batches.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        candidates: Sequence[Candidate],
        evaluate: Evaluate,
        method: str,
        batches: Sequence[Any],
        collected: Collected,
    ) -> None:
        super().__init__(graph, candidates, evaluate)
        bring_in_step(self.model, None)  # what is replayed has the operations of what is compensated
        self._method = method
        self._batches = batches
        self._collected = collected
        self._trial_batch: Any = None
        self._pairs: list[FoldablePair] = []
        self._first_uses: dict[str, int] = {}
        self._compensator: Compensator | None = None
        self._replays: list[Replay] = []  # of the batches to compensate on
        self._remembered: dict[tuple[int, int], dict[str, Tensor]] = {}  # by candidate and boundary
        self._bytes = 0

    # -- deciding --------------------------------------------------------------------------------------------------

    @override
    def jobs(self, batch: Any) -> list[Job]:
        self.batch = batch
        self._trial_batch = _first_samples(batch) if self.evaluate is classification else batch
        _, self._pairs = put_channels_last(self.model, self._find_pairs)
        trace = self._trace()
        self._operations = trace.operations
        self._first_uses = trace.first_use
        self.note_loss(trace.result)
        if self._method != "refit":
            with unfused_attention():
                self._compensator = Compensator(self.model, self._method, self._batches, self._make(), self._collected)
        return CompensatingPlanner(self.graph, trace).jobs(self.candidates, stack=1)

    def _find_pairs(self) -> tuple[Any, list[FoldablePair]]:
        self.tensors = named_tensors(self.model)  # as they are laid out now
        with self.standing_in({}):
            return foldable(self.model, self._evaluate_trial)

    def _trace(self) -> OperatorTrace:
        with self.standing_in({}):
            return trace_operators(self.evaluate_model, self.tensors)

    @override
    def begin(self, batch: Any) -> None:
        super().begin(batch)
        self._replays.clear()
        for number in range(len(self._batches)):
            self._replays.append(self._replay_of(number))

    def _replay_of(self, number: int) -> Replay:
        batch = self._batches[number]
        return Replay(lambda: self._evaluate(batch), self._operations, first_length(batch) or 0)

    # -- running ---------------------------------------------------------------------------------------------------

    @override
    def evaluate_model(self) -> Any:
        return self._evaluate(self.batch)

    def _evaluate_trial(self) -> Any:
        return self._evaluate(self._trial_batch)

    def _evaluate(self, batch: Any) -> Any:
        with unfused_attention():  # so that compensation sees its layers
            return self.evaluate(self.model, batch)

    @override
    def run_plainly(self, member: int) -> Measurement:
        with self.standing_in(self._compensated(member), self._plan(member)):
            return as_measurement(self.evaluate_model())

    @override
    def run_shortcut(self, job: Job) -> list[Measurement]:
        (member,) = job.members
        tensors = self._compensated(member, job.boundary)
        self._advance([self._replay], job.boundary)
        with self.standing_in(tensors, self._plan(member)):
            if job.way is Way.FOLDED:
                self._fold_behind(job.boundary)
            return [as_measurement(self._replay.run())]

    def _fold_behind(self, boundary: int) -> None:
        """Let convolutions behind a boundary do what the normalisations behind them do."""
        behind = [pair for pair in self._pairs if self._first_uses[f"{pair.convolution}.weight"] >= boundary]
        fold(self.model, behind)

    @override
    def agrees(self, job: Job, measured: Sequence[Measurement]) -> bool:
        """Tell whether a candidate computes the same when nothing is replayed or folded: on a few samples if it can."""
        (member,) = job.members
        if job.boundary:
            return super().agrees(job, measured)
        tensors = self._compensated(member)
        with self.standing_in(tensors, self._plan(member)):
            plain = as_measurement(self._evaluate_trial())
        with self.standing_in(tensors, self._plan(member)):
            if job.way is Way.FOLDED:
                self._fold_behind(0)
            folded = as_measurement(self._evaluate_trial())
        return self.are_close(folded.loss, plain.loss)

    @override
    def note_failure(self, job: Job) -> None:
        if job.way is not Way.FOLDED:  # that the result of a convolution has other uses is common
            super().note_failure(job)

    @override
    def fall_back(self, job: Job) -> list[Measurement]:
        if job.way is Way.FOLDED:
            return self.measure(Job(Way.SLICED, job.boundary, job.members))
        return super().fall_back(job)

    # -- compensating ----------------------------------------------------------------------------------------------

    def _plan(self, member: int) -> PruningPlan | None:
        candidate = self.candidates[member]
        return None if isinstance(candidate, Noise) else candidate

    def _compensated(self, member: int, boundary: int = 0) -> dict[str, Tensor]:
        """Return the tensors of a candidate; they are worked out once and serve for all batches, if there is room.

        Args:
            member: Number of the candidate.
            boundary: Number of operations that are replayed.
        """
        key = member, boundary
        known = self._remembered.get(key)
        if known is not None:
            return known
        tensors = self._compensate(member, boundary)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes + size <= _REMEMBERED:
            self._bytes += size
            self._remembered[key] = tensors
        return tensors

    def _compensate(self, member: int, boundary: int) -> dict[str, Tensor]:
        candidate = self.candidates[member]
        if isinstance(candidate, Noise):
            plan, changed = PruningPlan(), noisy_tensors(self.graph, candidate, self.tensors)
        else:
            plan, changed = candidate, pruned_tensors(self.model, candidate)
        if not changed:
            return {}
        with unfused_attention():
            if self._compensator is None:
                found = compensation_by(self._make(), self.model, plan, self._method, self._batches)
                return {**changed, **found.tensors}
            if boundary:
                self._advance(self._replays, boundary)
            tensors = stand_ins(self.model, changed)
            before = [name for name, first in self._first_uses.items() if first < boundary]
            written = self._compensator.compensate(plan, tensors, self._make(boundary), before)
        return {name: tensors[name] for name in changed.keys() | written}

    def _make(self, boundary: int = 0) -> MakeNetwork:
        """Return what makes networks, each of which runs for one batch at a time.

        Args:
            boundary: Number of operations that are replayed.
        """
        numbers = {id(batch): number for number, batch in enumerate(self._batches)}
        evaluate = self.evaluate

        def make(tensors: Mapping[str, Tensor], plan: PruningPlan | None) -> Network:
            stand_ins = {id(tensor): tensors[name] for name, tensor in self.tensors.items()}
            twin = Twin(self.model, stand_ins)
            bring_in_step(twin.model, plan)
            measure = of_twin(evaluate, twin)

            def run(batch: Any) -> Any:
                if not boundary:
                    return measure(twin.model, batch)
                return self._replays[numbers[id(batch)]].run(lambda: measure(twin.model, batch))

            return run

        return make


def _first_samples(batch: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = labelled(batch)
    return inputs[:_ENOUGH_SAMPLES], labels[:_ENOUGH_SAMPLES]
