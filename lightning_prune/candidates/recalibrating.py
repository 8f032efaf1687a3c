"""Runner of candidates that get statistics of batch normalisation of their own, so that they have nothing in common.

Each runs alone, in the layout that is fastest. Nothing is reused from one candidate to the next.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.jobs import Job, Way
from lightning_prune.candidates.layout import FoldablePair, fold, foldable, put_channels_last
from lightning_prune.candidates.measures import Evaluate, Measurement, as_measurement, classification, labelled
from lightning_prune.candidates.runner import Runner
from lightning_prune.candidates.stand_ins import noisy_tensors
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.surgery import pruned_tensors
from lightning_prune.surgery.batch_norm import estimate_statistics, running_statistics

__all__ = ["RecalibratingRunner"]

_ENOUGH_SAMPLES = 8  # to tell whether two networks compute the same


class RecalibratingRunner(Runner):
    """Run candidates one by one, each with the statistics of batch normalisation that it has on some batches.

    Args:
        graph: As for `Runner`.
        candidates: As for `Runner`.
        evaluate: As for `Runner`.
        recalibration: The batches to estimate the statistics from.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        candidates: Sequence[Candidate],
        evaluate: Evaluate,
        recalibration: Sequence[Any],
    ) -> None:
        super().__init__(graph, candidates, evaluate)
        self._recalibration = recalibration
        self._trial_batch: Any = None
        self._pairs: list[FoldablePair] = []
        self._statistics: dict[int, list[Tensor]] = {}  # of batch normalisation, by candidate

    @override
    def jobs(self, batch: Any) -> list[Job]:
        self.batch = batch
        self._trial_batch = _first_samples(batch) if self.evaluate is classification else batch
        result, self._pairs = put_channels_last(self.model, self._find_pairs)
        self.note_loss(result)
        return [Job(Way.FOLDED, 0, (member,)) for member in range(len(self.candidates))]

    def _find_pairs(self) -> tuple[Any, list[FoldablePair]]:
        self.tensors = named_tensors(self.model)  # as they are laid out now
        with self.standing_in({}):
            return foldable(self.model, self._evaluate_trial)

    def _evaluate_trial(self) -> Any:
        return self.evaluate(self.model, self._trial_batch)

    @override
    def run_plainly(self, member: int) -> Measurement:
        with self.standing_in(self._stand_ins(member)):
            self._recalibrate(member)
            return as_measurement(self.evaluate_model())

    @override
    def run_shortcut(self, job: Job) -> list[Measurement]:
        """Run a candidate with its normalisations folded into its convolutions, once their statistics are known."""
        (member,) = job.members
        with self.standing_in(self._stand_ins(member)):
            self._recalibrate(member)
            fold(self.model, self._pairs)
            return [as_measurement(self.evaluate_model())]

    @override
    def agrees(self, job: Job, measured: Sequence[Measurement]) -> bool:
        """Tell whether a candidate computes the same on a few samples before and after folding."""
        (member,) = job.members
        with self.standing_in(self._stand_ins(member)):
            self._recalibrate(member)
            plain = as_measurement(self._evaluate_trial())
            fold(self.model, self._pairs)
            folded = as_measurement(self._evaluate_trial())
        return self.are_close(folded.loss, plain.loss)

    @override
    def note_failure(self, job: Job) -> None:
        """Say nothing: that the result of a convolution has other uses besides its normalisation is common."""

    def _stand_ins(self, member: int) -> dict[str, Tensor]:
        candidate = self.candidates[member]
        if isinstance(candidate, Noise):
            return noisy_tensors(self.graph, candidate, self.tensors)
        return pruned_tensors(self.model, candidate)

    def _recalibrate(self, member: int) -> None:
        """Give the model the statistics of a candidate, which are estimated once and serve for all batches."""
        if member not in self._statistics:
            estimate_statistics(self.model, self._recalibration, self.evaluate)
            self._statistics[member] = [buffer.clone() for buffer in running_statistics(self.model)]
        for buffer, known in zip(running_statistics(self.model), self._statistics[member], strict=True):
            buffer.copy_(known)


def _first_samples(batch: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = labelled(batch)
    return inputs[:_ENOUGH_SAMPLES], labels[:_ENOUGH_SAMPLES]
