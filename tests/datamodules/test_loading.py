"""Split, order, batches, shards and the way back into an epoch."""

import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler, RandomSampler

from lightning_prune.datamodules import DigitsDataModule, ImageDataModule
from lightning_prune.datamodules.augmentation import NUMBERS, Augmentation
from lightning_prune.datamodules.loading import EpochSampler, PixelImages, ResumableLoader, stratified_split


class NumberData(ImageDataModule):
    """Images of one pixel that are their own index; label 0, 1 or 2 in turn; test images begin at 150."""

    num_classes = 3
    input_shape = (1, 1, 1)

    def __init__(self, batch_size=8, num_workers=0, val_fraction=0.2, seed=0, count=90):
        augmentation = Augmentation((0.0,), (1 / 255,), crop_padding=0)
        super().__init__(batch_size, num_workers, val_fraction, seed, augmentation)
        self.count = count
        self.loaded = []

    def check_files(self):
        self.loaded.append("check")

    def load_images(self, train):
        self.loaded.append("train" if train else "test")
        values = torch.arange(self.count) if train else torch.arange(150, 162)
        return PixelImages(values.to(torch.uint8).view(-1, 1, 1, 1), values % 3)


def numbers(loader):
    return [value for batch in loader for value in batch[0].flatten().tolist()]


def ready(**settings):
    data = NumberData(**settings)
    data.setup("fit")
    data.setup("test")
    return data


# ---- split ----


def test_split_covers_everything_once_and_keeps_the_proportions():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    rest, part = stratified_split(labels, 0.1, seed=3)
    assert sorted(rest + part) == list(range(100))
    assert [sum(labels[index] == label for index in part) for label in range(3)] == [5, 3, 2]
    assert rest == sorted(rest)
    assert part == sorted(part)


def test_split_depends_on_the_seed_alone():
    labels = torch.arange(100) % 10
    first = stratified_split(labels, 0.2, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert stratified_split(labels.tolist(), 0.2, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert stratified_split(labels, 0.2, seed=2) != first


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_every_class_of_two_is_in_both_parts(fraction):
    rest, part = stratified_split([0, 0, 1, 1, 2], fraction, seed=0)
    assert [len([i for i in part if i in pair]) for pair in ((0, 1), (2, 3), (4,))] == [1, 1, 0]
    assert len(rest) == 3


def test_validation_images_are_training_images():
    data = ready()
    training, validation = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert sorted(training + validation) == list(range(90))
    assert len(validation) == 18


def test_test_images_serve_test_and_prediction_alone():
    data = ready()
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == list(range(150, 162))


def test_labels_come_with_their_images():
    data = ready()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for pixels, labels, *_ in loader:
            assert torch.equal(pixels.flatten() % 3, labels)


def test_each_stage_loads_what_it_needs_once_and_checks_always():
    data = NumberData()
    for stage in ("fit", "fit", "validate", "test", "predict"):
        data.setup(stage)
    assert [name for name in data.loaded if name != "check"] == ["train", "test"]
    assert data.loaded.count("check") == 5


def test_nothing_to_validate_on_is_refused():
    with pytest.raises(ValueError, match=r"No class has two training images, .*: add images"):
        ready(count=3)


# ---- order and random numbers ----


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_order_is_a_function_of_seed_and_epoch():
    first = [numbers(epoch_of(ready(), epoch)) for epoch in range(3)]
    torch.manual_seed(99)
    assert [numbers(epoch_of(ready(), epoch)) for epoch in range(3)] == first
    assert first[0] != first[1] != first[2] != first[0]
    # The seed changes the split too: compare the ranks of the images, not the images.
    ranks = [sorted(order).index(order[0]) for order in (first[0], numbers(epoch_of(ready(seed=1), 0)))]
    assert ranks[0] != ranks[1]


def test_training_order_is_random_and_the_others_are_not():
    data = ready()
    assert numbers(data.train_dataloader()) != sorted(numbers(data.train_dataloader()))
    assert numbers(data.val_dataloader()) == sorted(numbers(data.val_dataloader()))
    assert not isinstance(data.val_dataloader().sampler, RandomSampler)


def random_numbers(batches):
    """Return the random numbers of each image of an epoch."""
    images, rows = (torch.cat(column) for column in list(zip(*batches, strict=True))[::2])
    return dict(zip(images.flatten().tolist(), rows.tolist(), strict=True))


def test_random_numbers_are_a_function_of_seed_epoch_and_image():
    first = random_numbers(epoch_of(ready(), 0))
    torch.manual_seed(99)
    assert random_numbers(epoch_of(ready(batch_size=5), 0)) == first
    values = torch.tensor(list(first.values()))
    assert values.shape == (72, NUMBERS)
    assert 0 <= values.min() < 0.05 < 0.95 < values.max() < 1
    assert values.unique().numel() == values.numel()
    for other in (epoch_of(ready(), 1), epoch_of(ready(seed=1), 0)):
        rows = random_numbers(other)
        assert not any(row == first.get(image) for image, row in rows.items())


@pytest.mark.parametrize("count", [1, 7, 40, 41])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shards_are_those_of_the_usual_sampler(count, replicas):
    part, rows = range(count), {}
    for rank in range(replicas):
        usual = DistributedSampler(part, replicas, rank, shuffle=True, seed=5)
        sampler = EpochSampler(part, 4, 5, replicas, rank)
        for epoch in (0, 3):
            usual.set_epoch(epoch)
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert [position for positions, _ in batches for position in positions.tolist()] == list(usual)
            assert len(batches) == len(sampler)
            assert all(len(positions) == 4 for positions, _ in batches[:-1])
            for positions, values in batches:
                for position, row in zip(positions.tolist(), values.tolist(), strict=True):
                    assert rows.setdefault((epoch, position), row) == row, "differs between processes"
    assert len(rows) == 2 * count


def test_workers_persist_and_change_nothing():
    alone = DigitsDataModule(batch_size=500, augment=True)
    helped = DigitsDataModule(batch_size=500, augment=True, num_workers=1)
    for data in (alone, helped):
        data.setup("fit")
    assert not alone.train_dataloader().persistent_workers
    loader = helped.train_dataloader()
    assert loader.persistent_workers
    assert loader.num_workers == 1
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for batch, same in zip(loader, epoch_of(alone, epoch), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(batch, same, strict=True))


# ---- back into an epoch ----


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("used", [0, 1, 5, 9])
def test_resumed_epoch_goes_on_where_it_was_interrupted(workers, used):
    whole, following = epoch_of(ready(), 2), epoch_of(ready(), 3)
    interrupted = ready().train_dataloader()
    interrupted.sampler.set_epoch(2)
    batches = iter(interrupted)
    for _ in range(used):
        next(batches)
    state = json.loads(json.dumps(interrupted.state_dict()))
    loader = ready(num_workers=workers).train_dataloader()
    loader.load_state_dict(state)
    rest = iter(loader)
    loader.sampler.set_epoch(2)  # Lightning does so after iter()
    assert len(loader) == len(whole) == 9
    assert numbers(rest) == numbers(whole[used:])
    assert loader.state_dict() == {"epoch": 2, "batches": 9, "used": 9}
    loader.sampler.set_epoch(3)
    assert numbers(loader) == numbers(following)


def test_epoch_that_ended_is_not_begun_again_in_the_middle():
    loader = ready().train_dataloader()
    for _ in zip(range(3), loader, strict=False):  # an epoch may end early, as with limit_train_batches
        pass
    resumed = ready().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    assert numbers(resumed) == numbers(epoch_of(ready(), 1))


def test_epoch_of_other_batches_is_refused_in_the_middle_only():
    data = ready(batch_size=4)
    loader = data.train_dataloader()
    for used in (0, 9):
        loader.load_state_dict({"epoch": 0, "batches": 9, "used": used})
    with pytest.raises(ValueError, match="after 3 of 9 batches of an epoch, and now it has 18: resume with the same"):
        loader.load_state_dict({"epoch": 0, "batches": 9, "used": 3})


def test_loader_of_training_images_is_resumable_and_pins_no_memory_without_a_gpu():
    loader = ready().train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert not loader.pin_memory


# ---- two processes ----


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class DisagreeingDigits(DigitsDataModule):
    """Ranks that disagree about the global generator must still agree about the split."""

    def setup(self, stage=None):
        torch.manual_seed(self.trainer.global_rank)
        super().setup(stage)


class Record(L.Callback):
    """Write down what each rank has seen."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += [hash(tuple(image.flatten().tolist())) for image in batch[0]]

    def on_train_end(self, trainer, module):
        data = trainer.datamodule
        result = {
            "train": data.train_set.indices.tolist(), "val": data.val_set.indices.tolist(), "seen": self.seen,
            "batches": trainer.num_training_batches, "loss": trainer.logged_metrics["val/loss"].item(),
            "weights": module.layer.weight.double().sum().item(),
        }  # fmt: skip
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


def test_two_processes_share_the_images_and_agree(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, callbacks=[Record(tmp_path)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DisagreeingDigits(batch_size=100))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("train", "val", "batches", "loss", "weights"):
        assert first[name] == second[name], name
    # 1295 training images are 648 per process, one of them twice; the images are all different.
    assert len(first["seen"]) == len(second["seen"]) == 648
    assert len(set(first["seen"]) | set(second["seen"])) == 1295
    assert first["batches"] == 7


# ---- refusals ----


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is no batch: set it to 1 or more"),
        ({"num_workers": -1}, "num_workers=-1 is negative: set it to 0"),
        ({"val_fraction": 0.0}, r"val_fraction=0.0 is outside \(0, 1\): set it to 0.1"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is outside \(0, 1\)"),
        ({"val_fraction": -0.5}, r"val_fraction=-0.5 is outside \(0, 1\)"),
        ({"seed": -1}, "seed=-1 is negative: set it to 0 or above"),
    ],
)
def test_bad_setting_is_refused_with_its_name_and_the_remedy(setting, message):
    with pytest.raises(ValueError, match=message):
        NumberData(**setting)


@pytest.mark.parametrize(
    ("name", "stage"), [("train", "fit"), ("val", "validate"), ("test", "test"), ("predict", "predict")]
)
def test_loader_before_setup_is_refused(name, stage):
    with pytest.raises(RuntimeError, match=rf"not loaded yet: call setup\('{stage}'\)"):
        getattr(NumberData(), f"{name}_dataloader")()
