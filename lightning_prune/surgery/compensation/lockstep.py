"""Lockstep: the network before and after the prune, carried forward together over all batches, from layer to layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.nested import first_length
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation.copies import shared_twin
from lightning_prune.surgery.compensation.operators import Step
from lightning_prune.surgery.compensation.runs import PausedRun
from lightning_prune.surgery.compensation.survey import names_of

__all__ = ["Lockstep", "Meeting", "Run"]

Run = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


@dataclass(frozen=True)
class Meeting:
    """One layer, as both networks call it for one batch.

    Attributes:
        whole: The call in the network before the prune.
        output: What it returned there.
        pruned: The call in the pruned network, before it runs.
        stream: What the output is added to, in the network before the prune and in the pruned one; None if nothing is
            known of it.
    """

    whole: Step
    output: Tensor
    pruned: Step
    stream: tuple[Tensor, Tensor] | None = None


class _Lane:
    """One batch, on its way through both networks."""

    def __init__(self, whole: PausedRun, pruned: PausedRun) -> None:
        self.whole = whole
        self.pruned = pruned

    def meeting_at(self, name: str) -> Meeting | None:
        """Go on with both networks if they are not paused, and return their calls if both are at a layer."""
        self.pruned.advance()
        if self.pruned.name != name:
            return None
        self.whole.advance()
        whole, output, pruned = self.whole.step, self.whole.output, self.pruned.step
        if self.whole.name != name or whole is None or output is None or pruned is None:
            return None
        streams = self.whole.noted.get(name), self.pruned.noted.get(name)
        stream = None
        if streams[0] is not None and streams[1] is not None:
            stream = streams[0], streams[1]
        return Meeting(whole, output, pruned, stream)

    def stop(self) -> None:
        self.whole.stop()
        self.pruned.stop()


class Lockstep:
    """Both networks, paused at one layer after the other; what is written to tensors there is what runs from there on.

    Modules are copied for each batch: what a forward pass writes down is not seen by that of another. Batches join as
    soon as there is room for them, and run through the layers that are done with without a pause, so that the cost is
    that of one pass over each batch.

    Args:
        model: The network before the prune.
        plan: What is kept of the original network afterwards.
        tensors: The tensors of the pruned network, by name.
        batches: The batches.
        run: Runs a model on a batch.
        streams: The layer whose input the output of another is added to, by the names of their tensors.

    Attributes:
        batches_seen: How many batches have joined.
        samples_seen: How many samples these had, by the first tensor of each.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        tensors: Mapping[str, Tensor],
        batches: Iterable[Any],
        run: Run,
        streams: Mapping[str, str],
    ) -> None:
        self._streams = streams
        self.batches_seen = 0
        self.samples_seen = 0
        self._model = model
        self._plan = plan
        self._tensors = tensors
        self._batches = iter(batches)
        self._run = run
        self._lanes: list[_Lane] = []
        self._pending: set[str] = set()

    def meetings(self, lanes_at: Mapping[str, int]) -> Iterator[tuple[str, list[Meeting]]]:
        """Yield each layer in turn, with its calls for all batches that are under way.

        Args:
            lanes_at: How many batches may be under way, by the name of the tensor of each layer to pause at, in order.
        """
        self._pending = set(lanes_at)
        try:
            for name, most in lanes_at.items():
                self._join(most)
                found = [lane.meeting_at(name) for lane in self._lanes]
                yield name, [meeting for meeting in found if meeting is not None]
                del found
                self._pending.discard(name)
        finally:
            for lane in self._lanes:
                lane.stop()
            self._lanes.clear()

    def _join(self, most: int) -> None:
        while len(self._lanes) < most:
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            self.batches_seen += 1
            self.samples_seen += first_length(batch) or 0
            whole = self._paused_run(named_tensors(self._model), batch, before=False)
            pruned = self._paused_run(self._tensors, batch, before=True)
            self._lanes.append(_Lane(whole, pruned))

    def _paused_run(self, tensors: Mapping[str, Tensor], batch: Any, before: bool) -> PausedRun:
        copied = shared_twin(self._model, tensors, self._plan if before else None)
        return PausedRun(lambda: self._run(copied, batch), names_of(tensors), self._pending, before, self._streams)
