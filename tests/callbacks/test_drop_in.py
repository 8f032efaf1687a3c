"""Projects that know nothing of pruning, as people write them, with one callback more."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import battery
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback, TaylorRankCallback
from lightning_prune.pruning_plan import plan_in_force

KINDS = [PruningCallback, TaylorRankCallback]


class Watch(L.Callback):
    """Note what is in which param group at the start, and the weights of the last epoch before its first step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.groups = groups(pl_module, trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1 and batch_idx == 0:
            self.last_epoch = {name: value.detach().clone() for name, value in pl_module.named_parameters()}


def groups(module: nn.Module, trainer: L.Trainer) -> list[list[list[str]]]:
    """Name the parameters in the param groups of all optimizers; what the module no longer has gives a KeyError."""
    names = {id(value): name for name, value in module.named_parameters()}
    return [[[names[id(p)] for p in group["params"]] for group in one.param_groups] for one in trainer.optimizers]


def train(
    root: Path, module: L.LightningModule, *callbacks: L.Callback, epochs: int = 4, **settings: Any
) -> tuple[L.Trainer, Watch]:
    """Train with the project's own data, or with the images of the battery."""
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, num_sanity_val_steps=0, limit_train_batches=6,
        limit_val_batches=2, callbacks=[*callbacks, watch, ModelCheckpoint(root, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, *(() if isinstance(module, BoringModel) else battery.loaders()), **settings)
    return trainer, watch


def check(module: L.LightningModule, whole: nn.Module, trainer: L.Trainer, watch: Watch) -> None:
    """Smaller; every parameter in its group, in place and order, and trained on; reloads onto the original class."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (module, whole)]
    assert sizes[0] < sizes[1]
    assert groups(module, trainer) == watch.groups
    assert sorted(name for one in watch.groups for group in one for name in group) == sorted(watch.last_epoch)
    still = [name for name, value in module.named_parameters() if torch.equal(value, watch.last_epoch[name])]
    assert still == []
    reloaded = lp.load_pruned(type(module), trainer.checkpoint_callback.best_model_path)
    assert battery.differences(module, reloaded) == []


# -- Lightning's demo --------------------------------------------------------------------------------------------------


class TwoLayers(BoringModel):
    """The demo with something to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_has_nothing_to_prune_and_says_so(kind: type[PruningCallback], tmp_path: Path) -> None:
    message = f"^{kind.__name__} finds nothing to prune: layer: is an output of the network\\.$"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, BoringModel(), kind())


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_with_two_layers(kind: type[PruningCallback], tmp_path: Path) -> None:
    module = TwoLayers()
    trainer, watch = train(tmp_path, module, kind(steps=2, round_to=1), epochs=4)
    check(module, TwoLayers(), trainer, watch)
    assert module.layer[0].out_features == 8


# -- a GAN -------------------------------------------------------------------------------------------------------------


# Its forward does not take what it is trained on.
WITHOUT_BATCHES = pytest.mark.filterwarnings("ignore:PruningCallback ranks channels without batches")


class GAN(L.LightningModule):
    """Two networks, two optimizers, optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(16, 1),
        )  # fmt: skip
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise).view(-1, 1, 8, 8)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, noise = batch[0], torch.randn(len(batch[0]), 8)
        generating, discriminating = self.optimizers()
        self.toggle_optimizer(generating)
        loss = F.softplus(-self.discriminator(self(noise))).mean()
        generating.zero_grad()
        self.manual_backward(loss)
        generating.step()
        self.untoggle_optimizer(generating)
        self.toggle_optimizer(discriminating)
        fake = self(noise).detach()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        discriminating.zero_grad()
        self.manual_backward(loss)
        discriminating.step()
        self.untoggle_optimizer(discriminating)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        generating = torch.optim.Adam(self.generator.parameters(), 1e-3, betas=(0.5, 0.999))
        discriminating = torch.optim.RMSprop(self.discriminator.parameters(), 1e-3, momentum=0.9)
        return [generating, discriminating], []


@WITHOUT_BATCHES
@pytest.mark.parametrize("kind", KINDS)
def test_a_gan_loses_channels_of_what_its_forward_runs(kind: type[PruningCallback], tmp_path: Path) -> None:
    module = GAN()
    trainer, watch = train(tmp_path, module, kind(round_to=1))
    check(module, GAN(), trainer, watch)
    assert module.generator[0].out_features == module.generator[1].num_features <= 16
    assert module.discriminator[0].out_channels == 16


@WITHOUT_BATCHES
@pytest.mark.parametrize("kind", KINDS)
def test_both_networks_of_a_gan_with_a_callback_each(kind: type[PruningCallback], tmp_path: Path) -> None:
    module = GAN()
    callbacks = [
        kind(module="generator", example_inputs=[2, 8], round_to=1),
        kind(module="discriminator", example_inputs=[2, 1, 8, 8], round_to=1, start_epoch=2, keep=0.4),
    ]
    trainer, watch = train(tmp_path, module, *callbacks)
    check(module, GAN(), trainer, watch)
    assert set(plan_in_force(module).widths) == {"generator.0", "discriminator.0", "discriminator.2"}
    assert module.discriminator[2].out_channels < 16


# -- an autoencoder ----------------------------------------------------------------------------------------------------


class Autoencoder(L.LightningModule):
    """Down by strides, up by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.Tanh()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder(kind: type[PruningCallback], tmp_path: Path) -> None:
    module = Autoencoder()
    trainer, watch = train(tmp_path, module, kind(steps=2, round_to=4), epochs=4)
    check(module, Autoencoder(), trainer, watch)
    assert module.decoder[0].in_channels == module.encoder[3].out_channels
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 1, 8, 8)
    assert any(width < 16 for width in (module.decoder[0].out_channels, module.encoder[0].out_channels))


# -- transfer learning -------------------------------------------------------------------------------------------------


class Transfer(L.LightningModule):
    """A head on a backbone that someone else has trained; the optimizer starts with what is trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2, momentum=0.9)


class Unfreeze(BaseFinetuning):
    """Train the head alone for some epochs, then the backbone too, in a param group of its own."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=2)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning restores the param groups of a resumed run, but leaves the backbone frozen, pruned or not.
        if trainer.current_epoch > self.epoch:
            self.make_trainable(pl_module.backbone)


HEAD = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
# Prunes before, at and after the epoch in which the backbone joins; Taylor ranks by gradients, so not before.
FINETUNING: list[tuple[Callable[[], PruningCallback], int]] = [
    (lambda: PruningCallback(steps=3, round_to=4), 2),
    (lambda: TaylorRankCallback(steps=2, start_epoch=2, round_to=4), 1),
]


@pytest.mark.parametrize("first", ["prune", "unfreeze"])
@pytest.mark.parametrize(("make", "epoch"), FINETUNING, ids=["magnitude", "taylor"])
def test_transfer_learning(make: Callable[[], PruningCallback], epoch: int, first: str, tmp_path: Path) -> None:
    module = Transfer()
    order = [make(), Unfreeze(epoch)] if first == "prune" else [Unfreeze(epoch), make()]
    trainer, watch = train(tmp_path, module, *order, epochs=5)
    backbone = [f"backbone.{name}" for name in ("0.weight", "1.weight", "1.bias", "3.weight", "3.bias")]
    assert watch.groups == [[HEAD]]
    assert groups(module, trainer) == [[HEAD, backbone]]
    watch.groups = [[HEAD, backbone]]
    check(module, Transfer(), trainer, watch)


@pytest.mark.parametrize("first", ["prune", "unfreeze"])
def test_transfer_learning_resumes_to_the_same_bits(first: str, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        order = [PruningCallback(steps=3, round_to=4), Unfreeze(2)]
        return order if first == "prune" else order[::-1]

    torch.manual_seed(0)
    unbroken = Transfer()
    start = copy.deepcopy(unbroken)
    train(tmp_path, unbroken, *callbacks(), epochs=5)
    for path in sorted(tmp_path.glob("*.ckpt")):
        resumed = copy.deepcopy(start)
        train(tmp_path / path.stem, resumed, *callbacks(), epochs=5, ckpt_path=path)
        assert battery.differences(unbroken, resumed) == [], path.name
