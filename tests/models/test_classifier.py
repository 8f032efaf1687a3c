import copy
import math
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.models import ImageClassifier, Optimization, build_network

SHAPE = (1, 8, 8)
TINY = {"network": "digits", "num_classes": 3, "input_shape": SHAPE, "network_args": {"width": 4}}


class FirstPixelData(L.LightningDataModule):
    """Images whose label is written in their first pixel, as easy as can be."""

    num_classes = 3

    def loader(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(24) % 3
        images = torch.rand(24, *SHAPE, generator=generator)
        images[:, 0, :2, :2] = labels.view(-1, 1, 1).float() * 3
        return DataLoader(TensorDataset(images, labels), batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class TwoHeads(nn.Module):
    """A network that returns two things while training, as googlenet of torchvision does."""

    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        return (logits, logits) if self.training else logits


def make_trainer(tmp_path, **settings):
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=tmp_path, **quiet, **(defaults | settings))


def save_weights(path, fill=0.5, **arguments):
    """Write a weights file in which every tensor is filled with one number."""
    network = build_network("digits", **({"num_classes": 3, "in_channels": 1, "width": 4} | arguments))
    torch.save({"state_dict": {k: torch.full_like(v, fill) for k, v in network.state_dict().items()}}, path)
    return str(path)


# ---- training ----


def test_training_learns_and_logs_the_six_names(tmp_path):
    torch.manual_seed(0)
    module, trainer = ImageClassifier(**TINY, optimization=Optimization(lr=0.05)), make_trainer(tmp_path, max_epochs=8)
    trainer.fit(module, FirstPixelData())
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} == set(trainer.logged_metrics)
    assert trainer.logged_metrics["val/accuracy"] == 1
    trainer.test(module, FirstPixelData(), verbose=False)
    assert set(trainer.logged_metrics) == {"test/loss", "test/accuracy"}


def test_logged_values_are_means_over_all_images(tmp_path):
    module, trainer = ImageClassifier(**TINY), make_trainer(tmp_path)
    # A last batch of 4 must count half as much as one of 8.
    images, labels = torch.rand(20, *SHAPE), torch.arange(20) % 3
    trainer.test(module, DataLoader(TensorDataset(images, labels), batch_size=8), verbose=False)
    with torch.no_grad():
        logits = module.eval()(images)
    assert trainer.logged_metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert trainer.logged_metrics["test/accuracy"].item() == pytest.approx(
        (logits.argmax(dim=1) == labels).float().mean().item()
    )


def test_top_five_and_each_class_are_logged(tmp_path):
    module = ImageClassifier("digits", 8, SHAPE, {"width": 4}, per_class=True)
    images, labels = torch.rand(40, *SHAPE), torch.arange(40) % 7
    with torch.no_grad():
        order = module.eval()(images).argsort(dim=1, descending=True)
    labels[0] = order[0, 0]  # the first batch cannot tell the metrics apart
    trainer = make_trainer(tmp_path)
    trainer.test(module, DataLoader(TensorDataset(images, labels), batch_size=1), verbose=False)
    right = (order[:, 0] == labels).float()
    expected = {f"test/accuracy_class_{k}": right[labels == k].mean().item() if k in labels else 0.0 for k in range(8)}
    expected["test/accuracy"] = right.mean().item()
    expected["test/accuracy_top5"] = (order[:, :5] == labels[:, None]).any(dim=1).float().mean().item()
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    del logged["test/loss"]
    assert logged == pytest.approx(expected)


def test_metrics_start_anew_with_every_epoch(tmp_path):
    module = ImageClassifier(**TINY)
    for labels in (torch.zeros(8).long(), torch.ones(8).long(), torch.full((8,), 2)):
        trainer = make_trainer(tmp_path)
        images = torch.rand(8, *SHAPE)
        trainer.validate(module, DataLoader(TensorDataset(images, labels), batch_size=4), verbose=False)
        expected = (module.eval()(images).argmax(dim=1) == labels).float().mean().item()
        assert trainer.logged_metrics["val/accuracy"].item() == pytest.approx(expected)


def test_mixed_images_train_and_are_judged_by_their_dominant_label(tmp_path):
    module = ImageClassifier(**TINY, regularization={"mixup": 0.5, "cutmix": 1.0})
    trainer = make_trainer(tmp_path)
    trainer.fit(module, FirstPixelData())
    assert trainer.logged_metrics["train/loss"].isfinite()
    assert 0 < trainer.logged_metrics["train/accuracy"] < 1


def test_channels_last_gives_the_same_outputs_in_the_other_format(tmp_path):
    module = ImageClassifier(**TINY).eval()
    other = ImageClassifier(**TINY, channels_last=True).eval()
    other.load_state_dict(module.state_dict())
    seen = []
    other.network.stage3.register_forward_hook(lambda layer, args, output: seen.append(output))
    images = torch.rand(2, *SHAPE)
    assert torch.allclose(module(images), other(images), atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert other.network.stage3[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_prediction_is_probabilities_with_and_without_labels(tmp_path):
    module, trainer = ImageClassifier(**TINY), make_trainer(tmp_path)
    images = torch.rand(4, *SHAPE)
    with_labels = trainer.predict(module, DataLoader(TensorDataset(images, torch.zeros(4).long()), batch_size=4))[0]
    without = trainer.predict(module, DataLoader(images, batch_size=4))[0]
    assert torch.equal(with_labels, without)
    assert torch.allclose(without.sum(dim=1), torch.ones(4))
    assert without.shape == (4, 3)


def test_label_smoothing_applies_to_training_only():
    module = ImageClassifier(**TINY, regularization={"label_smoothing": 0.3}).eval()
    batch = torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    logged = {}
    module.log = lambda name, value, **settings: logged.update({name: value})
    loss = module.training_step(batch, 0)
    module.validation_step(batch, 0)
    assert loss.item() == pytest.approx(F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.3).item())
    assert logged["val/loss"].item() == pytest.approx(F.cross_entropy(module(batch[0]), batch[1]).item())


def test_network_with_auxiliary_outputs_is_refused_with_the_remedy():
    module = ImageClassifier(network=f"{__name__}.TwoHeads", num_classes=3, input_shape=SHAPE)
    with pytest.raises(TypeError, match=r"TwoHeads' returns tuple while training .* switch its auxiliary heads off"):
        module.training_step((torch.rand(2, *SHAPE), torch.zeros(2).long()), 0)


# ---- optimizer and schedule ----


class LearningRates(L.Callback):
    """Note the learning rate of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule_steps_once_per_epoch(tmp_path):
    rates = LearningRates()
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[rates])
    trainer.fit(ImageClassifier(**TINY, optimization={"warmup_epochs": 1}), FirstPixelData())
    # Three batches per epoch; half in the warm-up epoch, then a cosine over the other three.
    cosine = [0.05 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert rates.seen == pytest.approx([rate for rate in (0.05, *cosine) for _ in range(3)])


def test_cosine_without_a_number_of_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"schedule='cosine' must know where it ends: set Trainer\(max_epochs"):
        make_trainer(tmp_path, max_epochs=-1, max_steps=2).fit(ImageClassifier(**TINY), FirstPixelData())
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=2)
    trainer.fit(ImageClassifier(**TINY, optimization={"schedule": "constant"}), FirstPixelData())
    assert trainer.global_step == 2


# ---- checkpoints and weights ----


def test_checkpoint_loads_safely_and_gives_equal_outputs(tmp_path):
    weights = save_weights(tmp_path / "start.th")
    module = ImageClassifier(**TINY, weights=weights, optimization=Optimization(lr=0.01))
    trainer = make_trainer(tmp_path, enable_checkpointing=True)
    trainer.fit(module, FirstPixelData())
    path = trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["network_args"] == {"width": 4}

    (tmp_path / "start.th").unlink()  # the machine that loads the checkpoint does not have the file
    loaded = ImageClassifier.load_from_checkpoint(path)
    images = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert loaded.optimization == Optimization(lr=0.01)


def test_weights_are_there_before_any_trainer(tmp_path):
    module = ImageClassifier(**TINY, weights=save_weights(tmp_path / "w.th"))
    assert all((parameter == 0.5).all() for parameter in module.network.parameters())


class Shrink(L.Callback):
    """Stand-in for a pruner: replaces the network by a narrower one in `setup`, as a resumed run does."""

    def setup(self, trainer, module, stage):
        module.network = build_network("digits", num_classes=3, in_channels=1, width=2)


def test_resumed_run_keeps_the_weights_of_its_checkpoint_on_a_shrunken_network(tmp_path):
    weights = save_weights(tmp_path / "w.th")
    first = make_trainer(tmp_path, max_epochs=1, callbacks=[Shrink()])
    first.fit(ImageClassifier(**TINY, weights=weights), FirstPixelData())
    first.save_checkpoint(tmp_path / "last.ckpt")

    class Compare(L.Callback):
        compared = False

        def on_train_start(self, trainer, module):
            saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
            assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())
            self.compared = True

    compare = Compare()
    second = make_trainer(tmp_path, max_epochs=2, callbacks=[Shrink(), compare])
    second.fit(ImageClassifier(**TINY, weights=weights), FirstPixelData(), ckpt_path=tmp_path / "last.ckpt")
    assert compare.compared
    assert second.current_epoch == 2


def test_missing_weights_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no weights file '.*none.th'"):
        ImageClassifier(**TINY, weights=str(tmp_path / "none.th"))


def test_weights_of_another_number_of_classes_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"does not fit DigitsNet \(of another shape: linear.weight \(10, 16\) instead"
    ):
        ImageClassifier(**TINY, weights=save_weights(tmp_path / "w.th", num_classes=10))


def test_module_can_be_copied_and_pickled():
    module = ImageClassifier(**TINY).eval()
    images = torch.rand(2, *SHAPE)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(images), module(images))


def test_example_input_is_one_image():
    assert ImageClassifier(**TINY).example_input_array.shape == (1, *SHAPE)


# ---- command line ----


class QuietCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
        parser.set_defaults({f"trainer.{name}": value for name, value in quiet.items()})


def run_cli(tmp_path, *arguments):
    model = ["network=digits", "num_classes=3", "input_shape=[1,8,8]", "network_args={width: 4}"]
    command = ["fit", f"--trainer.default_root_dir={tmp_path}", f"--model={ImageClassifier.__module__}.ImageClassifier"]
    return QuietCLI(
        L.LightningModule,
        FirstPixelData,
        subclass_mode_model=True,
        args=[*command, *(f"--model.{setting}" for setting in model), *arguments],
    )


def test_command_line_trains_and_its_checkpoint_loads(tmp_path):
    weights = save_weights(tmp_path / "w.th")
    cli = run_cli(tmp_path, f"--model.weights={weights}")
    path = cli.trainer.checkpoint_callback.best_model_path
    hyper_parameters = torch.load(path, weights_only=True)["hyper_parameters"]
    assert "weights" not in hyper_parameters
    assert hyper_parameters["num_classes"] == 3

    (tmp_path / "w.th").unlink()
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert torch.equal(loaded.network.linear.weight, cli.model.network.linear.weight.cpu())


def test_command_line_sets_single_values_of_a_group(tmp_path):
    cli = run_cli(
        tmp_path, "--model.optimization.optimizer=AdamW", "--model.optimization.lr=0.02",
        "--model.regularization.mixup=0.2", "--model.transfer.frozen=[stage1.*]",
    )  # fmt: skip
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["initial_lr"] == 0.02
    assert cli.model.regularization.mixup == 0.2
    path = cli.trainer.checkpoint_callback.best_model_path
    loaded = ImageClassifier.load_from_checkpoint(path)
    assert loaded.transfer == cli.model.transfer
    assert not loaded.network.stage1[0][0].weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*will be overridden.*")
def test_command_line_may_replace_optimizer_and_schedule(tmp_path):
    cli = run_cli(
        tmp_path, "--optimizer=Adam", "--optimizer.lr=0.02", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"
    )
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(cli.trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.StepLR)


# ---- refusals ----


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 is no choice: set the number of classes"),
        ({"input_shape": (8, 8)}, r"input_shape=\(8, 8\) is no image: give \(channels, height, width\)"),
        ({"input_shape": (1, 8, 0)}, r"input_shape=\(1, 8, 0\) is no image"),
        ({"optimization": {"lr": 0.0}}, "lr=0.0 would not train: set a learning rate above 0"),
        ({"regularization": {"label_smoothing": 1.0}}, r"label_smoothing=1.0 is outside \[0, 1\): set it to 0"),
        ({"transfer": {"unfreeze_epoch": 0}}, "unfreeze_epoch=0 freezes nothing: set it to 1"),
        ({"distillation": {"weights": "w", "share": 0}}, r"share=0 is outside \(0, 1\]: set `distillation` to null"),
        ({"optimization": {"rate": 1}}, r"Optimization cannot be made of \{'rate': 1\}: .*'rate'"),
        ({"network": "torchvision/resnet18", "network_args": {"weights": "DEFAULT"}}, "set `weights` instead"),
        ({"network": "digit"}, "Unknown network 'digit': choose one of resnet20"),
        ({"network_args": {"depth": 3}}, "'digits' cannot be built .*its arguments are"),
    ],
)
def test_bad_setting_is_refused_with_its_name_and_the_remedy(setting, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**(TINY | setting))
