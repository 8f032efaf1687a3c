"""Batches that callbacks measure on: drawing them makes no difference to training."""

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, TypeGuard

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_prune.callbacks.trial_run import never_validates

__all__ = [
    "ValidationBatches", "check_limit", "first_loaders_share", "gives_samples", "load_validation_split", "moved",
    "samples", "training_batches", "validating",
]  # fmt: skip

_USUAL_BATCH_SIZE = 128  # where a loader makes its batches in a way of its own, and the most that is taken at once

_WHO = "The callback, since no data set behind the training loader can be asked for samples,"


def check_limit(limit_batches: int | None) -> None:
    """Raise a ValueError unless a setting is a number of batches, or None."""
    if limit_batches is not None and limit_batches < 1:
        raise ValueError(f"limit_batches must be a whole number of at least 1, or None; got {limit_batches!r}.")


# -- the validation split ----------------------------------------------------------------------------------------------


class ValidationBatches:
    """The batches of the validation split, as validation would get them on this rank.

    Training goes on after they are drawn as if they had not been: random numbers, the generators of the loader and the
    state of the trainer are as before.

    Args:
        trainer: The trainer.
        limit: Greatest number of batches. If validation runs on more, they are made of samples chosen at random, the
            same ones each time: many a validation split is sorted by class.
        who: Name of the callback, for messages.

    Raises:
        ValueError: If the run has no validation split.
    """

    def __init__(self, trainer: "pl.Trainer", limit: int | None, who: str) -> None:
        load_validation_split(trainer)
        loaders = tree_leaves(trainer.val_dataloaders)
        counts = tree_leaves(trainer.num_val_batches)
        if never_validates(trainer) or not loaders or loaders[0] is None or not counts or counts[0] == 0:
            raise ValueError(
                f"{who} measures on the validation split, and this run has none; give the Trainer "
                "validation data, and see that limit_val_batches is not 0."
            )
        self.trainer = trainer
        self.loader = loaders[0]
        self.available: int | float = counts[0]  # infinite if the loader does not know
        self.count = self.available if limit is None else min(limit, self.available)

    def __length_hint__(self) -> int:
        return 0 if self.count == math.inf else int(self.count)

    def __iter__(self) -> Iterator[Any]:
        with self._without_a_trace():
            for batch in self._batches():
                yield moved(self.trainer, batch)

    def _batches(self) -> Iterator[Any]:
        takes_fewer = self.count < self.available < math.inf
        if takes_fewer and _takes_samples(self.loader):
            return iter(self._fewer_samples)
        return islice(self.loader, self.__length_hint__() or None)

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Put random numbers and the state of the trainer back in the end."""
        owners = self.loader, _sampler(self.loader)
        generators = [getattr(owner, "generator", None) for owner in owners]
        states = [(made, made.get_state()) for made in generators if isinstance(made, torch.Generator)]
        try:
            # Data modules may augment what is trained on, and ask the trainer what it is doing.
            with validating(self.trainer):
                yield
        finally:
            for generator, state in states:
                generator.set_state(state)

    @cached_property
    def _fewer_samples(self) -> "DataLoader[Any]":
        """The loader, but with some of the samples that validation runs on."""
        batch_size = self.loader.batch_sampler.batch_size
        torch.manual_seed(0)  # also for samplers that shuffle
        available = islice(_sampler(self.loader), int(self.available) * batch_size)
        positions = sorted(available)
        order = torch.randperm(len(positions)).tolist()
        first = order[: int(self.count) * batch_size]
        chosen = [positions[place] for place in first]
        # A copy has the workers, and what else its class does; a loader refuses another sampler except in this way.
        loader = copy.copy(self.loader)
        loader.__dict__.update(sampler=chosen, batch_sampler=BatchSampler(chosen, batch_size, False), _iterator=None)
        return loader


def load_validation_split(trainer: "pl.Trainer") -> None:
    """Have Lightning ask for the validation split now, which it may put off until the first validation."""
    if trainer.val_dataloaders is not None or not trainer.enable_validation:
        return
    with validating(trainer):
        trainer.fit_loop.epoch_loop.val_loop.setup_data()


@contextmanager
def validating(trainer: "pl.Trainer") -> Iterator[None]:
    """Let data modules and hooks that ask a trainer what it does find it validating; random numbers are put back."""
    was_training = trainer.training
    trainer.validating = True
    try:
        with isolate_rng():
            yield
    finally:
        trainer.training = was_training


# -- the training split ------------------------------------------------------------------------------------------------


def training_batches(trainer: "pl.Trainer", count: int, seed: int, of_all_ranks: bool = False) -> list[Any]:
    """Return some batches of the training split, the same ones on every rank and after a resume.

    They are drawn from the data set itself: a loader that knows its position would lose it. Where there is no data set
    that can be asked for samples, validation batches stand in.

    Args:
        trainer: The trainer.
        count: Number of batches; fewer if there are not so many.
        seed: Decides which samples, and how they are augmented.
        of_all_ranks: Make them of as many samples as all ranks take in a step, at most 128: those of a run on other
            ranks that takes as many. Otherwise as many as one rank takes.
    """
    loaders, structure = tree_flatten(trainer.train_dataloader)
    if not loaders or not all(gives_samples(loader) for loader in loaders):
        return list(ValidationBatches(trainer, count, _WHO)) if count else []
    sizes = [loader.batch_size or _USUAL_BATCH_SIZE for loader in loaders]
    if of_all_ranks:
        sizes = [min(size * trainer.world_size, _USUAL_BATCH_SIZE) for size in sizes]
    positions = [_batches_of_positions(loader, size, seed) for loader, size in zip(loaders, sizes, strict=True)]
    with isolate_rng():
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(seed)
        drawn = []
        for number in range(min(count, len(positions[0]))):
            shares = []  # of each loader; those after the first begin again when they come to their end
            for loader, of_batches in zip(loaders, positions, strict=True):
                shares.append(samples(loader, of_batches[number % len(of_batches)]))
            batch = moved(trainer, tree_unflatten(shares, structure))
            drawn.append(first_loaders_share(trainer, batch))
        return drawn


def _batches_of_positions(loader: "DataLoader[Any]", size: int, seed: int) -> list[list[int]]:
    """Deal out the samples of a loader to batches at random."""
    dataset: Any = loader.dataset
    available = len(dataset)
    size = min(size, available)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(available, generator=generator).tolist()
    starts = range(0, available - size + 1, size)
    return [order[start : start + size] for start in starts]


def first_loaders_share(trainer: "pl.Trainer", batch: Any) -> Any:
    """Return what the first of several training loaders has given to a batch, unless hooks have put it elsewhere."""
    structure = tree_structure(trainer.train_dataloader)
    try:
        shares = structure.flatten_up_to(batch)
    except ValueError:  # another structure than that of the loaders
        return batch
    return shares[0] if shares else batch


# -- loaders -----------------------------------------------------------------------------------------------------------


def gives_samples(loader: Any) -> "TypeGuard[DataLoader[Any]]":
    """Tell whether the data set of a loader can be asked for samples, which the loader then makes batches of."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None or hasattr(loader.dataset, "__getitems__")


def samples(loader: "DataLoader[Any]", positions: list[int]) -> Any:
    """Return a batch of some samples, without starting the loader: one that knows its position would lose it."""
    dataset: Any = loader.dataset
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__(positions))
    return loader.collate_fn([dataset[position] for position in positions])


def _sampler(loader: Any) -> Any:
    """Return what names the samples of a loader; one that was given a batch sampler has another, unused one besides."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owner = batch_sampler if hasattr(batch_sampler, "sampler") else loader
    return getattr(owner, "sampler", None)


def _takes_samples(loader: Any) -> bool:
    """Tell whether a loader makes its batches of the samples that a sampler names."""
    return gives_samples(loader) and type(loader.batch_sampler) is BatchSampler


def moved(trainer: "pl.Trainer", batch: Any) -> Any:
    """Return a batch as the module gets it: its type, its device and what hooks make of it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)
