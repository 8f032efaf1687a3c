"""Followers: copies of weights that a module or a callback of somebody's keeps, and brings up to date by itself.

A copy has the names and the shapes of what it is a copy of. Whether it follows that, or is a teacher that does not
change, is seen on twins: other weights are put in, a training step and the hooks around it run, and the copy has
changed or has not.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callbacks.rehearsal import TRAINING, Rehearsal, quiet_trainer
from lightning_prune.callbacks.schedule import Schedule
from lightning_prune.checkpoint.copies import Match, attributes_of, copies_in, items_of, outermost, own_of, sources_of
from lightning_prune.compiled import as_written
from lightning_prune.graph.entry import Step
from lightning_prune.graph.neutral import neutral_state
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.graph.twin import Twin, set_mode
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.surgery.pruning import Follower

__all__ = [
    "NONE",
    "Candidate",
    "Following",
    "candidates",
    "copies_of_callbacks",
    "followed_inside",
    "followers",
    "following",
]


@dataclass(frozen=True)
class Candidate:
    """A copy of weights.

    Attributes:
        place: Where it is, in words.
        callback: The callback that keeps it; None if the module does.
        kept: The module, or the dictionary or list of tensors.
        source: Dotted name of the submodule that it is a copy of.
        follower: Its tensors, by the names of those that they are copies of.
    """

    place: str
    callback: Callback | None
    kept: Any
    source: str
    follower: Follower


@dataclass(frozen=True)
class Following:
    """What follows the weights of a module, and is pruned and compensated with it.

    Attributes:
        elsewhere: Copies that are no part of the module.
        inside: Parts of the module that are copies of other parts.
    """

    elsewhere: Sequence[Follower] = ()
    inside: Sequence[Follower] = ()

    @property
    def copies(self) -> list[dict[str, Tensor]]:
        """The tensors by the names of what they follow, those together that are parts of one copy of the module."""
        copies: list[dict[str, Tensor]] = []
        for follower in (*self.elsewhere, *self.inside):
            tensors = dict(follower.tensors)
            into = next((copy for copy in copies if not copy.keys() & tensors.keys()), None)
            if into is None:
                copies.append(tensors)
            else:  # a momentum encoder, and the head that follows with it
                into.update(tensors)
        return copies


NONE = Following()


def following(rehearsal: Rehearsal, frozen: Sequence[str], plan: PruningPlan) -> Following:
    """Return what follows the weights of a module and loses the channels that a plan does not keep.

    Args:
        rehearsal: The steps of the LightningModule.
        frozen: Dotted names of the frozen parts.
        plan: The plan.
    """
    pl_module = rehearsal.pl_module
    names = {id(tensor): name for name, tensor in named_tensors(pl_module).items()}
    index = plan.index()
    averages = [name for name, module in pl_module.named_modules() if isinstance(module, AveragedModel)]
    inside = []
    for candidate in _frozen_copies(pl_module, [*frozen, *averages]):
        pairs = [(source, names[id(tensor)]) for source, tensor in candidate.follower.tensors.items()]
        touched = any(name in index for name, _ in pairs)
        if touched and all(_same_axes(index.get(one, {}), index.get(other, {})) for one, other in pairs):
            inside.append(candidate.follower)
    elsewhere = [candidate.follower for candidate in followers(rehearsal)]
    return Following(elsewhere, inside)


def _same_axes(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[axis], other[axis]) for axis in one)


def followers(rehearsal: Rehearsal, frozen: Sequence[str] = ()) -> list[Candidate]:
    """Return the copies that follow what they are copies of; the rehearsal notes whether there are any copies at all.

    Args:
        rehearsal: The steps of the LightningModule.
        frozen: Dotted names of the frozen parts, which may be copies too.
    """
    found = list(candidates(rehearsal.trainer, rehearsal.pl_module))
    inside = list(_frozen_copies(rehearsal.pl_module, frozen))
    rehearsal.keeps_copies = bool(found or inside)
    return _that_change(rehearsal, found)


def _that_change(rehearsal: Rehearsal, found: list[Candidate]) -> list[Candidate]:
    """Return those of some copies that a training step, or the hooks around it, change: now, or after a warm-up."""
    changed: list[Candidate] = []
    for moment in (rehearsal, rehearsal.later()):
        known = {id(candidate) for candidate in changed}
        changed += _changed_at(moment, [candidate for candidate in found if id(candidate) not in known])
    return changed


def _changed_at(rehearsal: Rehearsal, found: list[Candidate]) -> list[Candidate]:
    if not found:
        return []
    for step in rehearsal.first_steps(with_hooks=True):
        if step.name == TRAINING:
            changed = _Experiment(rehearsal, found).changed(step)
            if changed:
                return changed
    return []


def followed_inside(rehearsal: Rehearsal, frozen: Sequence[str]) -> dict[str, str]:
    """Return which tensors of frozen parts of a module follow others of it, by way of a callback or later on.

    Args:
        rehearsal: The steps of the LightningModule.
        frozen: Dotted names of the frozen parts.
    """
    pl_module = rehearsal.pl_module
    found = list(_frozen_copies(pl_module, frozen))
    names = {id(tensor): name for name, tensor in named_tensors(pl_module).items()}
    followed = {}
    for candidate in _that_change(rehearsal, found):
        for source, tensor in candidate.follower.tensors.items():
            followed[names[id(tensor)]] = source
    return followed


def _frozen_copies(pl_module: "pl.LightningModule", frozen: Sequence[str]) -> Iterator[Candidate]:
    """Yield the frozen parts of a module that have the names and shapes of another part."""
    sources = {}
    for name, module in pl_module.named_modules():
        if not _is_in(name, frozen):
            sources[name] = named_tensors(module)
    for name in frozen:
        match = outermost(pl_module.get_submodule(name), sources)
        if match is not None:
            yield Candidate(name, None, match.kept, match.source, match.follower)


def _is_in(name: str, parts: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


# -- finding copies ----------------------------------------------------------------------------------------------------


def candidates(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[Candidate]:
    """Yield the copies of weights that a module keeps where torch does not look, and those of callbacks."""
    own, sources = own_of(pl_module), sources_of(pl_module)
    for place, callback, value in _attributes(trainer, pl_module):
        for copy in copies_in(value, own):
            match = outermost(copy, sources)
            if match is not None:
                yield Candidate(place, callback, match.kept, match.source, match.follower)


def copies_of_callbacks(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[tuple[str, Match]]:
    """Yield the copies of weights that callbacks of somebody's keep, each with the names of class and attribute.

    Args:
        trainer: The trainer.
        pl_module: Its LightningModule.
    """
    keeping = [callback for callback in trainer.callbacks if _keeps_copies(callback)]  # type: ignore[attr-defined]
    own, sources = (own_of(pl_module), sources_of(pl_module)) if keeping else (set(), {})
    for callback in keeping:
        for name, value in vars(callback).items():
            for copy in copies_in(value, own):
                match = outermost(copy, sources)
                if match is not None:
                    yield f"{type(callback).__name__}.{name}", match


def _keeps_copies(callback: Callback) -> bool:
    return not isinstance(callback, WeightAveraging) and _is_somebodys(callback)


def _attributes(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[tuple[str, Callback | None, Any]]:
    """Yield the attributes of a module, its submodules and the callbacks, each with its name in words."""
    for name, value in attributes_of(pl_module):
        yield f"{name!r} of {type(pl_module).__name__}", None, value
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _keeps_copies(callback):
            for name, value in vars(callback).items():
                yield f"{name!r} of {type(callback).__name__}", callback, value


def _is_somebodys(callback: Callback) -> bool:
    """Tell whether a callback belongs neither to Lightning nor to this package."""
    return type(callback).__module__.partition(".")[0] not in ("lightning", "pytorch_lightning", "lightning_prune")


# -- whether they follow -----------------------------------------------------------------------------------------------


class _Experiment:
    """A training step of a twin with other weights, and what that makes of copies.

    Args:
        rehearsal: The steps of the LightningModule.
        found: The copies.
    """

    def __init__(self, rehearsal: Rehearsal, found: list[Candidate]) -> None:
        self.rehearsal = rehearsal
        self.found = found

    def changed(self, step: Step) -> list[Candidate]:
        """Return the copies that are others after a step."""
        module = self.rehearsal.pl_module
        with neutral_state(module), as_written():
            twin = Twin(module)
            copies = [self._copy_of(twin, candidate) for candidate in self.found]
            before = [_values(copy) for copy in copies]
            set_mode(twin.model, training=True)
            run = step.ready(twin.model)
            for parameter in twin.model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(1)
            with suppress(Exception):
                run(*step.args)
            self._run_callbacks(twin, step)
            after = [_values(copy) for copy in copies]
        changes = zip(self.found, before, after, strict=True)
        return [candidate for candidate, one, other in changes if not _same(one, other)]

    def _copy_of(self, twin: Twin, candidate: Candidate) -> Any:
        """Return what a twin has in place of a copy."""
        if candidate.callback is not None:
            twin.of(candidate.callback)
        return twin.of(candidate.kept)

    def _run_callbacks(self, twin: Twin, step: Step) -> None:
        """Run the hooks of callbacks that keep copies."""
        trainer = quiet_trainer(self.rehearsal, twin.model)
        hooks: dict[str, tuple[Any, ...]] = {
            "on_train_batch_start": (step.args[0], 0),
            "on_before_optimizer_step": tuple(trainer.optimizers[:1]),
            "on_before_zero_grad": tuple(trainer.optimizers[:1]),
            "on_train_batch_end": (None, step.args[0], 0),
            "on_train_epoch_end": (),
        }
        keeping = {id(candidate.callback) for candidate in self.found}
        any_may = id(None) in keeping  # a copy that the module keeps
        for callback in self.rehearsal.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Schedule):  # which would prune
                continue
            if not (id(callback) in keeping or (any_may and _is_somebodys(callback))):
                continue
            for name, args in hooks.items():
                if is_overridden(name, callback, Callback):
                    with suppress(Exception):
                        getattr(twin.of(callback), name)(trainer, twin.model, *args)


def _values(copy: Any) -> list[Tensor]:
    # Not the buffers of a module: a teacher that runs in training mode counts its batches.
    items = list(copy.parameters()) if isinstance(copy, nn.Module) else items_of(copy)
    return [item.clone() for item in items if isinstance(item, Tensor)]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
