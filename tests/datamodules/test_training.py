"""The classifier of this package on each of its data modules."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune.datamodules import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
)
from lightning_prune.models import ImageClassifier


def make_trainer(**settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**(quiet | settings))


def run_once(data):
    module = ImageClassifier("digits", data.num_classes, data.input_shape, {"width": 4})
    trainer = make_trainer(fast_dev_run=True)
    trainer.fit(module, data)
    assert {"train/loss", "val/accuracy"} <= set(trainer.logged_metrics)
    trainer.test(module, data, verbose=False)
    assert "test/accuracy" in trainer.logged_metrics
    probabilities = trainer.predict(module, data)[0]
    assert probabilities.shape[1] == data.num_classes


def test_digits():
    run_once(DigitsDataModule())


def test_mnist(mnist_root):
    run_once(MNISTDataModule(str(mnist_root)))


def test_cifar10(cifar10_root):
    run_once(CIFAR10DataModule(str(cifar10_root)))


def test_image_folder(image_root):
    run_once(ImageFolderDataModule(str(image_root)))


def test_missing_data_stops_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST/raw' does not exist"):
        run_once(MNISTDataModule(str(tmp_path)))


def test_digits_are_learned_in_three_epochs():
    torch.manual_seed(0)
    module, data = ImageClassifier("digits", 10, (1, 8, 8), lr=0.05), DigitsDataModule()
    trainer = make_trainer(max_epochs=3, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert trainer.logged_metrics["test/accuracy"] > 0.97


class PowerCutError(Exception):
    pass


class CutPower(L.Callback):
    """End the run at the start of the third epoch, as if the machine had been switched off."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            raise PowerCutError


def test_interrupted_run_ends_like_an_unbroken_one(tmp_path):
    def train(callbacks, **arguments):
        torch.manual_seed(0)
        module = ImageClassifier("digits", 10, (1, 8, 8), {"width": 4}, warmup_epochs=1)
        trainer = make_trainer(max_epochs=4, callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(module, DigitsDataModule(batch_size=100), **arguments)
        return module.state_dict()

    unbroken = train([])
    with pytest.raises(PowerCutError):
        train([ModelCheckpoint(tmp_path / "cut", save_last=True), CutPower()])
    torch.rand(7)  # the resumed process has another history
    resumed = train([], ckpt_path=tmp_path / "cut" / "last.ckpt")
    for key, value in unbroken.items():
        assert torch.equal(resumed[key], value), key
