"""The golden files: a plan, a checkpoint in the middle of a schedule, one of its end, and the losses that they give.

They were written once, by the version that ``losses.json`` names, and are read by every later one::

    PYTHONPATH=tests python -m golden.make FOLDER

They are never written anew for a change of the format: a format that can no longer be read is a fault. A new format
gets files of its own beside these.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import battery
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import TaylorRankCallback
from lightning_prune.pruning_plan import PruningPlan, plan_in_force

EPOCHS = 4
STEPS = 4  # of an epoch
STOPPED = 10  # in the third epoch: one prune of two is done, and the next one is being scored


class Golden(L.LightningModule):
    """A tiny network with what plans have to know: coupled layers, normalisation, and several positions a channel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.back = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(4 * width, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(x + self.back(F.relu(self.norm(self.body(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.noted.append(float(outputs["loss"]))


class Stop(Callback):
    """Writes a checkpoint in the middle of an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STOPPED:
            trainer.save_checkpoint(self.path)


def weights(model: nn.Module) -> nn.Module:
    """Give a module numbers that do not depend on how any version draws random ones."""
    with torch.no_grad():
        for number, tensor in enumerate(model.parameters()):
            positions = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            tensor.copy_(torch.sin(positions * 1.7 + number) * 0.4)
    return model


def images() -> TensorDataset:
    """Return images whose numbers are those of a formula."""
    positions = torch.arange(8 * STEPS * 36, dtype=torch.float64).view(8 * STEPS, 1, 6, 6)
    labels = torch.arange(8 * STEPS) % 3
    return TensorDataset((torch.cos(positions * 0.37) + labels.view(-1, 1, 1, 1)).float(), labels)


def callback() -> TaylorRankCallback:
    """Return the callback of the golden run."""
    return TaylorRankCallback(keep=0.5, start_epoch=1, steps=2, every_n_epochs=2, round_to=1, momentum=0.25)


def train(root: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> tuple[Golden, L.Trainer, list[float]]:
    """Train to the end, and return the module, the trainer and the losses."""
    losses = Losses()
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        callbacks=[callback(), *callbacks, losses],
    )  # fmt: skip
    module = weights(Golden())
    trainer.fit(module, battery.ResumableLoader(images(), 8), ckpt_path=ckpt_path)
    return module, trainer, losses.noted


def loss_of(module: nn.Module) -> float:
    """Return the loss over all images, in evaluation mode."""
    inputs, labels = images().tensors
    with torch.no_grad():
        return float(F.cross_entropy(module.eval()(inputs), labels))


def pruned_by(plan: PruningPlan) -> Golden:
    """Return the network of the formula, pruned by a plan."""
    module = weights(Golden())
    lp.prune(module, plan)
    return module


def main(folder: Path) -> None:
    """Write the golden files."""
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        module, trainer, losses = train(Path(root), Stop(folder / "stopped.ckpt"))
    trainer.save_checkpoint(folder / "pruned.ckpt", weights_only=True)
    plan = plan_in_force(module)
    (folder / "plan.json").write_text(json.dumps(plan.to_json()) + "\n")
    told = {
        "version": lp.__version__,
        "widths": plan.widths,
        "digest": plan.digest,
        "losses_after_the_stop": losses[STOPPED:],
        "loss_of_pruned": loss_of(module),
        "loss_by_plan": loss_of(pruned_by(plan)),
    }
    (folder / "losses.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    from golden import make  # so that the class has the name that it has in tests

    make.main(Path(sys.argv[1]))
