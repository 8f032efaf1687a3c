"""The validation batches that callbacks measure on: which samples, and that drawing them leaves no trace."""

import os
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
)

from lightning_prune.callbacks.batches import ValidationBatches


class Look(Callback):
    """Draws validation batches when training starts, and again after each epoch."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.seen: list[list[tuple[Tensor, Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = torch.get_rng_state()
        self.seen.append(list(ValidationBatches(trainer, self.limit, "Look")))
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.training

    on_train_epoch_end = on_train_start


def sorted_by_class(count: int = 100, classes: int = 10) -> TensorDataset:
    labels = torch.arange(count) * classes // count
    return TensorDataset(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels)


def look(
    root: Path, loader: Any, limit: int | None, kind: type[Look] = Look, **trainer: Any
) -> list[list[tuple[Tensor, Tensor]]]:
    callback = kind(limit)
    L.seed_everything(0, verbose=False)
    fitted = L.Trainer(
        max_epochs=2, limit_train_batches=1, callbacks=[callback], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=root,
        **trainer,
    )  # fmt: skip
    fitted.fit(battery.ResidualClassifier(), battery.loaders()[0], loader)
    return callback.seen


def test_some_batches_of_a_sorted_split_hold_all_classes(tmp_path: Path) -> None:
    seen = look(tmp_path, DataLoader(sorted_by_class(), 10), limit=4)
    assert len(seen) == 3
    for batches in seen:
        labels = torch.cat([labels for _, labels in batches])
        assert [len(labels) for _, labels in batches] == [10] * 4
        assert len(labels.unique()) >= 9
        pixels = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
        assert len(pixels.unique()) == 40
        assert torch.equal((pixels * 10 // 100).long(), labels)  # each with its own
        assert torch.equal(pixels, torch.cat([images[:, 0, 0, 0] for images, _ in seen[0]]))


def test_all_batches_come_in_the_order_of_the_loader(tmp_path: Path) -> None:
    for limit in (None, 10, 50):
        (batches, *_) = look(tmp_path, DataLoader(sorted_by_class(95), 10), limit)
        assert torch.equal(torch.cat([images[:, 0, 0, 0] for images, _ in batches]), torch.arange(95.0))


def test_only_samples_that_validation_runs_on_are_drawn(tmp_path: Path) -> None:
    (batches, *_) = look(tmp_path, DataLoader(sorted_by_class(), 10), limit=2, limit_val_batches=3)
    pixels = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    assert len(pixels) == 20
    assert pixels.max() < 30
    assert pixels.max() - pixels.min() >= 20  # not the first two batches


class WholeBatches(Dataset[Any]):
    """Serves whole batches at once, as the data modules of this package do."""

    def __len__(self) -> int:
        return 100

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        return tuple(torch.stack(part) for part in zip(*(sorted_by_class()[i] for i in positions), strict=True))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(sorted_by_class())


def test_data_sets_of_whole_batches_and_streams(tmp_path: Path) -> None:
    whole = look(tmp_path, DataLoader(WholeBatches(), 10, collate_fn=lambda batch: batch), limit=4)
    plain = look(tmp_path, DataLoader(sorted_by_class(), 10), limit=4)
    for (images, _), (expected, _) in zip(whole[0], plain[0], strict=True):
        assert torch.equal(images, expected)
    (batches, *_) = look(tmp_path, DataLoader(Stream(), 10), limit=2)  # nothing to choose from: the first ones
    assert torch.equal(torch.cat([images[:, 0, 0, 0] for images, _ in batches]), torch.arange(20.0))


def test_a_loader_that_was_given_a_batch_sampler(tmp_path: Path) -> None:
    data = sorted_by_class()
    (batches, *_) = look(tmp_path, DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 10, True)), 4)
    (expected, *_) = look(tmp_path, DataLoader(data, 10), 4)
    for (images, _), (same, _) in zip(batches, expected, strict=True):
        assert torch.equal(images, same)


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_a_loader_that_shuffles_gives_the_same_samples_each_time(part: float, tmp_path: Path) -> None:
    seen = look(tmp_path, DataLoader(sorted_by_class(), 10, shuffle=True), limit=4, limit_val_batches=part)
    for batches in seen:
        for (images, _), (same, _) in zip(batches, seen[0], strict=True):
            assert torch.equal(images, same)


class Negative(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ((-images, labels) for images, labels in super().__iter__())


class Opened(Dataset[Any]):
    """Can be read only in workers."""

    is_open = False

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert self.is_open
        return sorted_by_class()[index]


def open_data_set(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.is_open = True


def test_some_batches_are_made_as_the_loader_makes_them(tmp_path: Path) -> None:
    (plain, *_) = look(tmp_path, DataLoader(sorted_by_class(), 10), limit=2)
    (negative, *_) = look(tmp_path, Negative(sorted_by_class(), 10), limit=2)
    loader = DataLoader(Opened(), 10, num_workers=1, worker_init_fn=open_data_set)
    (opened, *_) = look(tmp_path, loader, limit=2, num_sanity_val_steps=0, check_val_every_n_epoch=9)
    for (images, _), (negated, _), (same, _) in zip(plain, negative, opened, strict=True):
        assert torch.equal(images, -negated)
        assert torch.equal(images, same)


@pytest.mark.parametrize("both", [True, False])
def test_a_shuffling_loader_keeps_the_state_of_its_generator(both: bool, tmp_path: Path) -> None:
    data, generator = sorted_by_class(), torch.Generator().manual_seed(3)
    sampler = RandomSampler(data, generator=generator)
    loader = DataLoader(data, 10, sampler=sampler, generator=generator if both else None)
    look(tmp_path, loader, limit=2, limit_val_batches=0.5, check_val_every_n_epoch=9, num_sanity_val_steps=0)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_ranks_draw_from_their_own_parts(tmp_path: Path) -> None:
    data = sorted_by_class()
    for rank in (0, 1):
        loader = DataLoader(data, 10, sampler=DistributedSampler(data, 2, rank, shuffle=False))
        (batches, *_) = look(tmp_path, loader, limit=2)
        labels, pixels = (torch.cat(part) for part in zip(*[(y, x[:, 0, 0, 0]) for x, y in batches], strict=True))
        assert len(pixels.unique()) == 20
        assert (pixels % 2 == rank).all()
        assert len(labels.unique()) >= 7


@pytest.mark.parametrize("every", [1, 2, 9])
def test_the_split_is_there_though_the_first_validation_is_to_come(every: int, tmp_path: Path) -> None:
    loader = DataLoader(sorted_by_class(), 10)
    seen = look(tmp_path, loader, limit=1, check_val_every_n_epoch=every, num_sanity_val_steps=0)
    assert [len(batches) for batches in seen] == [1, 1, 1]


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Look measures on the validation split, and this run has none"):
        look(tmp_path, DataLoader(sorted_by_class(), 10), limit=1, limit_val_batches=0)


class Workers(Dataset[Any]):
    """Labels are the process that has loaded them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8, 8), os.getpid()


class LookTwice(Look):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = ValidationBatches(trainer, self.limit, "LookTwice")
        self.seen += [list(batches), list(batches)]


def test_workers_serve_several_measurements(tmp_path: Path) -> None:
    loader = DataLoader(Workers(), 10, num_workers=1, persistent_workers=True)
    first, second, *_ = look(tmp_path, loader, 2, LookTwice, num_sanity_val_steps=0)
    (mine,), (same,) = ({int(label) for _, labels in batches for label in labels} for batches in (first, second))
    assert mine == same != os.getpid()
