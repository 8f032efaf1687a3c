"""Training on each of the data modules: all stages, precisions, and runs that are interrupted."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_prune.callbacks import PruningCallback
from lightning_prune.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    MNISTDataModule,
)


class Classifier(L.LightningModule):
    def __init__(self, data, width=4):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(data.input_shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, data.num_classes),
        )  # fmt: skip

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def make_trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**(quiet | settings))


def run_once(data):
    module, trainer = Classifier(data), make_trainer(fast_dev_run=True)
    trainer.fit(module, data)
    assert "val/accuracy" in trainer.logged_metrics
    trainer.test(module, data, verbose=False)
    assert "test/accuracy" in trainer.logged_metrics
    probabilities = trainer.predict(module, data)[0]
    assert probabilities.shape[1] == data.num_classes


def test_digits():
    run_once(DigitsDataModule())


@pytest.mark.parametrize("module", [MNISTDataModule, FashionMNISTDataModule])
def test_mnist(mnist_root, module):
    run_once(module(str(mnist_root)))


@pytest.mark.parametrize("module", [CIFAR10DataModule, CIFAR100DataModule])
def test_cifar(cifar_root, module):
    run_once(module(str(cifar_root), cutout=8))


@pytest.mark.parametrize("in_memory", [True, False])
def test_image_folder(image_root, in_memory):
    run_once(ImageFolderDataModule(str(image_root), in_memory=in_memory))


def test_imagenet(image_root):
    (image_root / "test").rename(image_root / "val")
    run_once(ImageNetDataModule(str(image_root), image_size=16, num_workers=0, val_fraction=0.2))


def test_missing_data_stops_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST/raw' does not exist"):
        run_once(MNISTDataModule(str(tmp_path)))


def test_digits_are_learned_in_five_epochs():
    data = DigitsDataModule()
    module, trainer = Classifier(data, width=16), make_trainer(max_epochs=5, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert trainer.logged_metrics["test/accuracy"] > 0.9


class Seen(L.Callback):
    """Note the type of the images that the model gets."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.dtype = batch[0].dtype

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.validation_dtype = batch[0].dtype


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_images_have_the_type_of_the_precision(precision, dtype):
    data, seen = DigitsDataModule(), Seen()
    make_trainer(fast_dev_run=True, precision=precision, callbacks=[seen]).fit(Classifier(data), data)
    assert seen.dtype == seen.validation_dtype == dtype


def test_pruner_without_example_inputs_sees_what_the_model_gets():
    data = DigitsDataModule()
    module = Classifier(data, width=8)
    before = sum(parameter.numel() for parameter in module.parameters())
    trainer = make_trainer(
        max_epochs=2, limit_train_batches=2, callbacks=[PruningCallback(keep=0.5, round_to=1)],
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert sum(parameter.numel() for parameter in module.parameters()) < before


class PowerCutError(Exception):
    pass


class CutPower(L.Callback):
    """End the run before a batch of the third epoch, as if the machine had been switched off."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, self.batch):
            raise PowerCutError


def interrupted_and_unbroken(make_data, folder, batch, every_n_train_steps=None, **settings):
    """Return the weights of a run that was cut off before a batch and resumed, and those of one that was not."""

    def train(callbacks, **arguments):
        torch.manual_seed(0)
        data = make_data()
        module = Classifier(data)
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, default_root_dir=folder, **settings)
        trainer.fit(module, data, **arguments)
        return module.state_dict()

    unbroken = train([])
    saver = ModelCheckpoint(folder / "cut", save_last=True, every_n_train_steps=every_n_train_steps)
    with pytest.raises(PowerCutError):
        train([saver, CutPower(batch)])
    torch.rand(7)  # the resumed process has another history
    return train([saver], ckpt_path=folder / "cut" / "last.ckpt"), unbroken


def augmented_digits():
    return DigitsDataModule(batch_size=200, augment=True)


@pytest.mark.parametrize("batch", [0, 1, 6])
def test_run_resumed_within_an_epoch_ends_like_an_unbroken_one(tmp_path, batch):
    resumed, unbroken = interrupted_and_unbroken(augmented_digits, tmp_path, batch, every_n_train_steps=1)
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


def test_run_resumed_at_the_end_of_an_epoch_ends_like_an_unbroken_one(tmp_path):
    resumed, unbroken = interrupted_and_unbroken(augmented_digits, tmp_path, 3)
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


def test_run_resumed_in_an_epoch_of_fewer_batches_ends_like_an_unbroken_one(tmp_path):
    resumed, unbroken = interrupted_and_unbroken(augmented_digits, tmp_path, 3, 3, limit_train_batches=5)
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_over_files_ends_like_an_unbroken_one(tmp_path, image_root, workers):
    (image_root / "test").rename(image_root / "val")

    def make_data():
        return ImageNetDataModule(str(image_root), 16, batch_size=4, num_workers=workers, val_fraction=0.2)

    resumed, unbroken = interrupted_and_unbroken(make_data, tmp_path, 4, every_n_train_steps=1)
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("overfit_batches", [2, 0.5])
def test_the_same_few_batches_in_each_epoch_to_overfit_on(overfit_batches):
    class Batches(L.Callback):
        def __init__(self):
            self.labels = {}

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.labels.setdefault(trainer.current_epoch, []).append(batch[1].tolist())

    data, batches = DigitsDataModule(batch_size=64), Batches()
    trainer = make_trainer(
        max_epochs=2, overfit_batches=overfit_batches, callbacks=[batches, PruningCallback(round_to=1)],
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Classifier(data), data)
    assert len(batches.labels[0]) == trainer.num_training_batches > 0
    assert batches.labels[0] == batches.labels[1]
