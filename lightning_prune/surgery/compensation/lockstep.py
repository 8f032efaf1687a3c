"""Lockstep: networks carried forward together over all batches, from layer to layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.graph.nested import first_length
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.compensation.copies import shared_twin
from lightning_prune.surgery.compensation.operators import Step
from lightning_prune.surgery.compensation.runs import PausedRun
from lightning_prune.surgery.compensation.survey import names_of

__all__ = ["BothLanes", "Lane", "Lockstep", "MakeNetwork", "Meeting", "PrunedLanes", "Run", "networks_of"]

Run = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""
Network = Callable[[Any], Any]
"""Runs a network on a batch."""
MakeNetwork = Callable[[Mapping[str, Tensor], PruningPlan | None], Network]
"""Makes a network, which runs for one batch at a time, of tensors by name and of what has been pruned from them."""

Met = TypeVar("Met")


def networks_of(model: nn.Module, run: Run) -> MakeNetwork:
    """Return what makes twins of a model.

    Args:
        model: The model.
        run: Runs a twin on a batch.
    """

    def make(tensors: Mapping[str, Tensor], plan: PruningPlan | None) -> Network:
        copied = shared_twin(model, tensors, plan)
        return lambda batch: run(copied, batch)

    return make


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


class Lane(ABC, Generic[Met]):
    """One batch, on its way."""

    @abstractmethod
    def meeting_at(self, name: str) -> Met | None:
        """Go on to the next pause if there is none now, and return what is to be seen if it is at a layer."""

    @abstractmethod
    def stop(self) -> None:
        """End the runs."""


StartLane = Callable[[Any, Container[str]], Lane[Met]]
"""Given a batch and the layers to pause at, puts the batch on its way."""


class BothLanes:
    """Make lanes of a batch, on its way through the network before the prune and through the pruned one.

    Args:
        model: The network before the prune.
        plan: What is kept of the original network afterwards.
        tensors: The tensors of the pruned network, by name.
        make: Makes the networks.
        streams: The layer whose input the output of another is added to, by the names of their tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        tensors: Mapping[str, Tensor],
        make: MakeNetwork,
        streams: Mapping[str, str],
    ) -> None:
        self._own = named_tensors(model)
        self._plan = plan
        self._tensors = tensors
        self._make = make
        self._streams = streams

    def start(self, batch: Any, pause_at: Container[str]) -> Lane[Meeting]:
        """Put a batch on its way, with pauses at some layers."""
        of_whole = self._make(self._own, None)
        of_pruned = self._make(self._tensors, self._plan)
        whole = PausedRun(lambda: of_whole(batch), names_of(self._own), pause_at, before=False, streams=self._streams)
        pruned = PausedRun(
            lambda: of_pruned(batch), names_of(self._tensors), pause_at, before=True, streams=self._streams
        )
        return _BothLane(whole, pruned)


class _BothLane(Lane[Meeting]):
    def __init__(self, whole: PausedRun, pruned: PausedRun) -> None:
        self.whole = whole
        self.pruned = pruned

    @override
    def meeting_at(self, name: str) -> Meeting | None:
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

    @override
    def stop(self) -> None:
        self.whole.stop()
        self.pruned.stop()


class PrunedLanes:
    """Make lanes of a batch, on its way through the pruned network alone.

    Args:
        plan: What is kept of the original network; None if nothing is pruned.
        tensors: The tensors of the pruned network, by name.
        make: Makes the networks.
    """

    def __init__(self, plan: PruningPlan | None, tensors: Mapping[str, Tensor], make: MakeNetwork) -> None:
        self._plan = plan
        self._tensors = tensors
        self._make = make

    def start(self, batch: Any, pause_at: Container[str]) -> Lane[Step]:
        """Put a batch on its way, with pauses at some layers."""
        network = self._make(self._tensors, self._plan)
        names = names_of(self._tensors)
        run = PausedRun(lambda: network(batch), names, pause_at, before=True, streams={})
        return _PrunedLane(run)


class _PrunedLane(Lane[Step]):
    def __init__(self, run: PausedRun) -> None:
        self.run = run

    @override
    def meeting_at(self, name: str) -> Step | None:
        self.run.advance()
        return self.run.step if self.run.name == name else None

    @override
    def stop(self) -> None:
        self.run.stop()


class Lockstep(Generic[Met]):
    """Networks, paused at one layer after the other; what is written to tensors there is what runs from there on.

    Modules are copied for each batch: what a forward pass writes down is not seen by that of another. Batches join as
    soon as there is room for them, and run through the layers that are done with without a pause, so that the cost is
    that of one pass over each batch.

    Args:
        batches: The batches.
        start: Puts one on its way.

    Attributes:
        batches_seen: How many batches have joined.
        samples_seen: How many samples these had, by the first tensor of each.
    """

    def __init__(self, batches: Iterable[Any], start: StartLane[Met]) -> None:
        self.batches_seen = 0
        self.samples_seen = 0
        self._batches = iter(batches)
        self._start = start
        self._lanes: list[Lane[Met]] = []
        self._pending: set[str] = set()

    def meetings(self, lanes_at: Mapping[str, int]) -> Iterator[tuple[str, list[Met]]]:
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
            self._lanes.append(self._start(batch, self._pending))
