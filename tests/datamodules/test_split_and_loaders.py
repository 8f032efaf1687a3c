import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import RandomSampler

from lightning_prune.datamodules import DigitsDataModule, ImageDataModule
from lightning_prune.datamodules.base import check_normalisation, require_files, stratified_split


class NumberImages:
    """Ninety "images" that are their own index; label 0, 1 or 2 in turn."""

    def __init__(self, count=90, start=0):
        self.values = list(range(start, start + count))
        self.targets = [value % 3 for value in self.values]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index], self.targets[index]


class NumberData(ImageDataModule):
    """Training images are marked by 1000 (as if augmented), test images begin at 500."""

    num_classes = 3
    input_shape = (1, 1, 1)

    def __init__(self, batch_size=8, num_workers=0, val_fraction=0.2, seed=0, count=90):
        super().__init__(batch_size, num_workers, val_fraction, seed)
        self.count = count
        self.loaded = []

    def check_files(self):
        self.loaded.append("check")

    def load_images(self, train):
        self.loaded.append("train" if train else "test")
        return NumberImages(self.count) if train else NumberImages(12, start=500)

    def transform(self, train):
        return lambda value: torch.tensor(float(value + 1000 * train))


def numbers(loader):
    return [int(value) for images, _ in loader for value in images]


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


def test_validation_images_are_training_images_without_augmentation():
    data = ready()
    training, validation = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert all(1000 <= value < 1090 for value in training)
    assert all(0 <= value < 90 for value in validation)
    assert sorted([value - 1000 for value in training] + validation) == list(range(90))
    assert len(validation) == 18


def test_test_images_serve_test_and_prediction_alone():
    data = ready()
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == list(range(500, 512))


def test_each_stage_loads_what_it_needs_once_and_checks_always():
    data = NumberData()
    for stage in ("fit", "fit", "validate", "test", "predict"):
        data.setup(stage)
    assert [name for name in data.loaded if name != "check"] == ["train", "test"]
    assert data.loaded.count("check") == 5


def test_nothing_to_validate_on_is_refused():
    with pytest.raises(ValueError, match=r"No class has two training images, .*: add images"):
        ready(count=3)


# ---- order ----


def order_in_epoch(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return numbers(loader)


def test_order_is_a_function_of_seed_and_epoch():
    first = [order_in_epoch(ready(), epoch) for epoch in range(3)]
    torch.manual_seed(99)
    assert [order_in_epoch(ready(), epoch) for epoch in range(3)] == first
    assert first[0] != first[1] != first[2] != first[0]
    # The seed changes the split too: compare the ranks of the images, not the images.
    ranks = [sorted(order).index(order[0]) for order in (first[0], order_in_epoch(ready(seed=1), 0))]
    assert ranks[0] != ranks[1]


def test_training_order_is_random_and_the_others_are_not():
    data = ready()
    assert numbers(data.train_dataloader()) != sorted(numbers(data.train_dataloader()))
    assert numbers(data.val_dataloader()) == sorted(numbers(data.val_dataloader()))
    assert not isinstance(data.val_dataloader().sampler, RandomSampler)


def test_workers_persist_and_change_nothing():
    alone = DigitsDataModule(batch_size=500)
    helped = DigitsDataModule(batch_size=500, num_workers=1)
    for data in (alone, helped):
        data.setup("fit")
    assert not alone.train_dataloader().persistent_workers
    loader = helped.train_dataloader()
    assert loader.persistent_workers
    assert loader.num_workers == 1
    for (images, labels), (same_images, same_labels) in zip(loader, alone.train_dataloader(), strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


DISTRIBUTED = """
    import json, os, sys
    import lightning as L
    import torch
    from lightning_prune.datamodules import DigitsDataModule
    from lightning_prune.models import ImageClassifier

    torch.set_num_threads(1)

    class Watch(L.Callback):
        seen, order = [], []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.order += [hash(tuple(image.flatten().tolist())) for image in batch[0]]

    # Ranks that disagree about the global generator must still agree about the split.
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    data = DigitsDataModule(batch_size=100)
    module = ImageClassifier("digits", 10, (1, 8, 8), {"width": 4})
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, data)
    result = {
        "train": list(data.train_set.indices), "val": list(data.val_set.indices), "order": watch.order,
        "batches": trainer.num_training_batches, "accuracy": trainer.logged_metrics["val/accuracy"].item(),
        "loss": trainer.logged_metrics["val/loss"].item(),
        "weights": [parameter.double().sum().item() for parameter in module.parameters()],
    }
    with open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w") as file:
        json.dump(result, file)
"""


def test_two_processes_share_the_images_and_agree(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("train", "val", "batches", "accuracy", "loss", "weights"):
        assert first[name] == second[name], name
    # 1295 training images are 648 per process, one of them twice; the images are all different.
    assert len(first["order"]) == len(second["order"]) == 648
    assert len(set(first["order"]) | set(second["order"])) == 1295
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


def test_normalisation_is_checked():
    with pytest.raises(ValueError, match="mean has 1 and std 3 values: give 3 of each"):
        check_normalisation((0.5,), (0.5, 0.5, 0.5), channels=3)
    with pytest.raises(ValueError, match=r"std=\(0.5, 0.0, 0.5\) must be above 0"):
        check_normalisation((0.5, 0.5, 0.5), (0.5, 0.0, 0.5), channels=3)


def test_required_files_are_named(tmp_path):
    (tmp_path / "one").touch()
    with pytest.raises(FileNotFoundError, match="is incomplete, it lacks two, three: buy them"):
        require_files(tmp_path, ["one", "two", "three"], "buy them.")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist: buy them"):
        require_files(tmp_path / "nowhere", ["one"], "buy them.")
    require_files(tmp_path, ["one"], "buy them.")
