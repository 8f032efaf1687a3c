"""Runner that reuses what candidates have in common with the model: a pass starts at the first difference from it."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.candidates.candidate import Candidate, Noise
from lightning_prune.candidates.jobs import Job, Planner, Way
from lightning_prune.candidates.measures import (
    Evaluate,
    Measurement,
    as_measurement,
    classification,
    labelled,
    per_sample,
    samples_in,
)
from lightning_prune.candidates.operator_trace import trace_operators
from lightning_prune.candidates.replay import Replay
from lightning_prune.candidates.runner import Runner, Shortcut
from lightning_prune.candidates.stand_ins import input_masks, maskable_layers, masked_tensors, noisy_tensors
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery import pruned_tensors

__all__ = ["ReplayingRunner"]

_FULL_BATCH = {"cpu": 128, "cuda": 2048}  # samples in a batch from which more of them do not make a device faster

Arguments = tuple[Any, ...]
PreHook = Callable[[nn.Module, Arguments], Arguments]


class ReplayingRunner(Runner):
    """Run candidates from the first operation on that differs from the model, and several of them as one batch.

    Args:
        graph: As for `Runner`.
        candidates: As for `Runner`.
        evaluate: As for `Runner`; only `classification` can be done for several candidates as one batch.
    """

    def __init__(self, graph: ChannelGraph, candidates: Sequence[Candidate], evaluate: Evaluate) -> None:
        super().__init__(graph, candidates, evaluate)
        self._operations: list[Any] = []
        self._maskable: set[str] = set()
        self._replay = Replay(self.evaluate_model, [], 0)
        self._repeated_batch: tuple[Tensor, Tensor] | None = None

    @override
    def jobs(self, batch: Any) -> list[Job]:
        self.batch = batch
        with self.standing_in({}):
            layers = maskable_layers(self.model)
            with _count_calls(layers.values()) as calls:
                trace = trace_operators(self.evaluate_model, self.tensors)
        # A weight that is used otherwise than by calling its layer is not masked by a mask on what the layer is given.
        self._maskable = {name for name, layer in layers.items() if calls[layer] == trace.uses[name]}
        self._operations = trace.operations
        self.note_loss(trace.result)
        planner = Planner(self.graph, trace, self._maskable)
        return planner.jobs(self.candidates, self._candidates_in_a_stack(samples_in(batch)))

    def _candidates_in_a_stack(self, samples: int) -> int:
        if self.evaluate is not classification:
            return 1
        device = next(iter(self.tensors.values())).device.type
        return max(1, _FULL_BATCH.get(device, 1) // samples)

    @override
    def begin(self, batch: Any) -> None:
        super().begin(batch)
        self._replay = Replay(self.evaluate_model, self._operations, samples_in(batch))
        self._repeated_batch = None

    @override
    def shortcut_of(self, job: Job) -> Shortcut:
        # What is repeated in a stack is told from the rest by its size, which may be that of other tensors by chance.
        samples = samples_in(self.batch) if job.way is Way.STACKED else 0
        return Shortcut(job.way, job.boundary, samples)

    @override
    def agrees(self, job: Job, measured: Sequence[Measurement]) -> bool:
        effects = [abs(one.loss - self.loss_of_model) for one in measured]
        most = effects.index(max(effects))  # the member that differs most from the model tells most
        plain = self.run_plainly(job.members[most])
        return self.are_close(measured[most].loss, plain.loss)

    @override
    def note_failure(self, job: Job) -> None:
        if job.way is Way.STACKED:  # which says nothing of the operations; candidates are tried one by one next
            return
        warnings.warn(
            f"{type(self.model).__name__} does not repeat the same operations, so that nothing can be reused "
            "from one candidate to the next; they are measured one by one, which takes longer.",
            stacklevel=2,
        )

    @override
    def fall_back(self, job: Job) -> list[Measurement]:
        if job.way is not Way.STACKED:
            return super().fall_back(job)
        measured = []
        for member in job.members:
            measured += self.measure(Job(Way.MASKED, job.boundary, (member,)))
        return measured

    @override
    def run_plainly(self, member: int) -> Measurement:
        candidate = self.candidates[member]
        way = Way.MASKED if self._is_mask_exact(candidate) else Way.SLICED
        with self.standing_in(self._stand_ins(way, candidate), _sliced(way, candidate)):
            return as_measurement(self.evaluate_model())

    @override
    def run_shortcut(self, job: Job) -> list[Measurement]:
        self._advance([self._replay], job.boundary)
        if job.way is Way.STACKED:
            with self.standing_in({}):
                return self._run_stacked(job.members)
        candidate = self.candidates[job.members[0]]
        with self.standing_in(self._stand_ins(job.way, candidate), _sliced(job.way, candidate)):
            return [as_measurement(self._replay.run())]

    def _advance(self, replays: Iterable[Replay], boundary: int) -> None:
        """Move replays on to a boundary, by a pass of the model where that takes one."""
        behind = [replay for replay in replays if replay.boundary != boundary]
        if behind:
            with self.standing_in({}):
                for replay in behind:
                    replay.advance(boundary)

    def _run_stacked(self, members: Sequence[int]) -> list[Measurement]:
        """Run several masked candidates as one batch, in which each has its own copy of the samples."""
        copies = len(members)
        inputs, labels = self._repeat_batch(copies)
        plans = [cast(PruningPlan, self.candidates[member]) for member in members]
        masks = input_masks(self.graph, plans, self.tensors)

        def run() -> tuple[Tensor, Tensor]:
            logits = self.model(inputs)
            return per_sample(logits, labels)

        layers = maskable_layers(self.model)
        for name, mask in masks.items():
            layers[name].register_forward_pre_hook(_masking(mask))
        losses, hits = self._replay.run(run, copies)
        by_copy = torch.stack([losses, hits]).unflatten(1, (copies, -1))  # (2, copies, samples)
        rows = by_copy.mean(2).t().tolist()
        return [Measurement(*row) for row in rows]

    def _repeat_batch(self, copies: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels, repeated along the axis of the samples."""
        inputs, labels = labelled(self.batch)
        repeated = self._repeated_batch
        if repeated is None or len(repeated[0]) != copies * len(inputs):
            repeated_inputs = torch.cat([inputs] * copies)
            repeated_labels = torch.cat([labels] * copies)
            repeated = (repeated_inputs, repeated_labels)
            self._repeated_batch = repeated
        return repeated

    def _stand_ins(self, way: Way, candidate: Candidate) -> dict[str, Tensor]:
        """Return the tensors that make the model a candidate, by the name of those that they stand in for."""
        if isinstance(candidate, Noise):
            return noisy_tensors(self.graph, candidate, self.tensors)
        if way is Way.SLICED:
            return pruned_tensors(self.model, candidate)
        return masked_tensors(self.graph, candidate, self.tensors)

    def _is_mask_exact(self, candidate: Candidate) -> bool:
        if isinstance(candidate, Noise):
            return True
        groups = [self.graph.group(name) for name in candidate.groups]
        return not any(group.not_mask_exact for group in groups)


def _sliced(way: Way, candidate: Candidate) -> PruningPlan | None:
    """Return what is pruned from the tensors that make the model a candidate, if anything is."""
    return candidate if way is Way.SLICED and isinstance(candidate, PruningPlan) else None


@contextmanager
def _count_calls(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Count how often modules are called."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any) -> None:
        calls[module] += 1

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(count))
        yield calls


def _masking(mask: Tensor) -> PreHook:
    """Return a hook that zeroes the inputs which the copies of a batch do not consume.

    Args:
        mask: (copies, inputs).
    """

    def hook(module: nn.Module, args: Arguments) -> Arguments:
        values, *others = args
        by_copy = values.unflatten(0, (len(mask), -1))  # (copies, samples, ...)
        axis = by_copy.dim() - 1 if isinstance(module, nn.Linear) else 2
        shape = [1] * by_copy.dim()
        shape[0], shape[axis] = mask.shape
        masked = by_copy * mask.view(shape)
        return (masked.flatten(0, 1), *others)

    return hook
