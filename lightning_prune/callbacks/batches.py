"""Batches that callbacks measure on: drawing them leaves no trace in training."""

import copy
import random
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, TypeGuard

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

__all__ = ["ValidationBatches", "first_part", "gives_samples", "samples", "training_batches"]


class ValidationBatches:
    """The batches of the validation split, as validation would get them on this rank; drawing them leaves no trace.

    Args:
        trainer: The trainer.
        limit: Greatest number of batches. If validation runs on more, they are made of samples chosen at random, the
            same ones each time: many a validation split is sorted by class.
        who: Name of the callback, for messages.

    Raises:
        ValueError: If the run has no validation split.
    """

    def __init__(self, trainer: "pl.Trainer", limit: int | None, who: str) -> None:
        _load_validation_split(trainer)
        loaders = tree_leaves(trainer.val_dataloaders)
        counts = tree_leaves(trainer.num_val_batches)
        if not loaders or loaders[0] is None or not counts or counts[0] == 0:
            raise ValueError(
                f"{who} measures on the validation split, and this run has none; give the Trainer "
                "validation data, and see that limit_val_batches is not 0."
            )
        self.trainer, self.loader, self.all = trainer, loaders[0], counts[0]
        self.count = self.all if limit is None else min(limit, self.all)

    def __length_hint__(self) -> int:
        return 0 if self.count == float("inf") else int(self.count)

    def __iter__(self) -> Iterator[Any]:
        drawn_from = [getattr(self.loader, "generator", None), getattr(_sampler(self.loader), "generator", None)]
        states = [(each, each.get_state()) for each in drawn_from if isinstance(each, torch.Generator)]
        # Data modules may augment what is trained on, and ask the trainer what it is doing.
        training, self.trainer.validating = self.trainer.training, True
        try:
            with isolate_rng():
                some = self.count < self.all < float("inf") and _takes_samples(self.loader)
                loader = self._chosen if some else islice(self.loader, self.__length_hint__() or None)
                for batch in loader:
                    yield _moved(self.trainer, batch)
        finally:
            self.trainer.training = training
            for generator, state in states:
                generator.set_state(state)

    @cached_property
    def _chosen(self) -> "DataLoader[Any]":
        """The loader, but with some of the samples that validation runs on."""
        size = self.loader.batch_sampler.batch_size
        torch.manual_seed(0)  # also for samplers that shuffle
        positions = sorted(islice(_sampler(self.loader), int(self.all) * size))
        chosen = [positions[at] for at in torch.randperm(len(positions))[: int(self.count) * size].tolist()]
        # A copy has the workers, and what else its class does; a loader refuses another sampler except in this way.
        loader = copy.copy(self.loader)
        loader.__dict__.update(sampler=chosen, batch_sampler=BatchSampler(chosen, size, False), _iterator=None)
        return loader


def _sampler(loader: Any) -> Any:
    """Return what names the samples of a loader; one that was given a batch sampler has another, unused one besides."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches if hasattr(batches, "sampler") else loader, "sampler", None)


def _takes_samples(loader: Any) -> bool:
    """Tell whether a loader makes its batches of the samples that a sampler names."""
    return gives_samples(loader) and type(loader.batch_sampler) is BatchSampler


def _load_validation_split(trainer: "pl.Trainer") -> None:
    """Have Lightning ask for the validation split now, which it may leave until the first validation."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        training, trainer.validating = trainer.training, True
        with isolate_rng():
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = training


def training_batches(trainer: "pl.Trainer", count: int, seed: int) -> list[Any]:
    """Return some batches of the training split, the same ones on every rank and after a resume.

    They are drawn from the data set itself: a loader that knows its position would lose it. Where there is no data set
    that can be asked for samples, validation batches stand in.

    Args:
        trainer: The trainer.
        count: Number of batches; fewer if there are not so many.
        seed: Decides which samples, and how they are augmented.
    """
    loaders, structure = tree_flatten(trainer.train_dataloader)
    if not loaders or not all(gives_samples(loader) for loader in loaders):
        return list(ValidationBatches(trainer, count, "The callback")) if count else []
    chosen = [_some_positions(loader, seed) for loader in loaders]
    with isolate_rng():
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        drawn = []
        for number in range(min(count, len(chosen[0]))):  # the other loaders begin again when they come to their end
            parts = [samples(loader, some[number % len(some)]) for loader, some in zip(loaders, chosen, strict=True)]
            drawn.append(first_part(trainer, _moved(trainer, tree_unflatten(parts, structure))))
        return drawn


def _some_positions(loader: "DataLoader[Any]", seed: int) -> list[list[int]]:
    """Deal out the samples of a loader to batches at random."""
    dataset: Any = loader.dataset
    size = min(loader.batch_size or 128, len(dataset))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def first_part(trainer: "pl.Trainer", batch: Any) -> Any:
    """Return what the first of several training loaders has given to a batch, unless hooks have put it elsewhere."""
    try:
        return next(iter(tree_structure(trainer.train_dataloader).flatten_up_to(batch)), batch)
    except ValueError:  # another structure than that of the loaders
        return batch


def gives_samples(loader: Any) -> "TypeGuard[DataLoader[Any]]":
    """Tell whether the data set of a loader can be asked for samples, which the loader then makes batches of."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None or hasattr(loader.dataset, "__getitems__")


def samples(loader: "DataLoader[Any]", positions: list[int]) -> Any:
    """Return a batch of some samples, without starting the loader: one that knows its position would lose it."""
    dataset: Any = loader.dataset
    asked = dataset.__getitems__(positions) if hasattr(dataset, "__getitems__") else [dataset[i] for i in positions]
    return loader.collate_fn(asked)


def _moved(trainer: "pl.Trainer", batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)
