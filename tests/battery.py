"""One table of callbacks, and the networks and loaders that all of them are put through.

Every callback of the library has a row in `CALLBACKS`; `test_battery.py` puts each row through the same checks.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_prune.callbacks import (
    AFIEEarlyPruneCallback,
    LearnToPruneCallback,
    PruningCallback,
    RLJointPruneCallback,
    SensitivenessCallback,
    TaylorRankCallback,
)
from lightning_prune.models import SmallImageViT

MAGNITUDE: dict[str, Any] = {
    "keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "criterion": "l1", "compensate": "none",
}  # fmt: skip
# Settings that make each callback prune three times within `EPOCHS` epochs.
CALLBACKS: dict[str, tuple[type[PruningCallback], dict[str, Any]]] = {
    "default": (
        PruningCallback,
        {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "compensate_batches": 2},
    ),
    "magnitude": (PruningCallback, MAGNITUDE),
    "magnitude_refit": (PruningCallback, {**MAGNITUDE, "compensate": "refit", "compensate_batches": 2}),
    "magnitude_distilled": (PruningCallback, {**MAGNITUDE, "distill": {"temperature": 2.0, "share": 0.5}}),
    "magnitude_stopping": (
        PruningCallback,
        {**MAGNITUDE, "steps": 1, "max_drop": 1.0, "monitor": "val/accuracy", "step_keep": 0.75},
    ),
    "taylor": (TaylorRankCallback, {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2}),
    "taylor_gate": (
        TaylorRankCallback,
        {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "variant": "gate", "momentum": 0.5},
    ),
    "afie": (AFIEEarlyPruneCallback, {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2}),
    "sensitiveness": (
        SensitivenessCallback,
        {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "levels": [0.5], "draws": 2},
    ),
    "rl_joint": (
        RLJointPruneCallback,
        {
            "keep": 0.5,
            "start_epoch": 1,
            "warmup_epochs": 0,
            "round_to": 2,
            "episodes": 4,
            "strength": 1e-2,
            "search_settings": {"agent_updates": 2, "environment_updates": 2, "environment_size": 4},
        },
    ),
    "learn_to_prune": (
        LearnToPruneCallback,
        {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "updates": 3, "samples": 3},
    ),
    "vit": (
        PruningCallback,
        {
            "keep": 0.5,
            "steps": 3,
            "start_epoch": 1,
            "round_to": 2,
            "compensate_batches": 2,
            "ranking": "isomorphic",
        },
    ),
    "momentum_encoder": (
        PruningCallback,
        {"keep": 0.5, "steps": 3, "start_epoch": 1, "round_to": 2, "compensate_batches": 2},
    ),
    "blocks": (
        PruningCallback,
        {
            "keep": 0.5,
            "steps": 3,
            "start_epoch": 1,
            "round_to": 2,
            "compensate_batches": 2,
            "ranking": "isomorphic",
            "blocks": True,
        },
    ),
}
EPOCHS = 5
BATCHES = 6


def make_callback(name: str, **changes: Any) -> PruningCallback:
    """Make the callback of one row."""
    kind, settings = CALLBACKS[name]
    validated = {} if name.startswith("magnitude") else {"validate_batches": 0}  # all do it in the same way
    return kind(**{**validated, **settings, **changes})


class Classifier(L.LightningModule):
    """A module that knows nothing of pruning; Adam and a schedule, so that there is state to lose."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)}


class ResidualClassifier(Classifier):
    """A small residual network."""

    def __init__(self, width: int = 12, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.second = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width * 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.relu(x + self.second(F.relu(self.norm(self.first(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class TransformerClassifier(Classifier):
    """A small vision transformer."""

    depth = 1

    def __init__(self, width: int = 12, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = SmallImageViT(4, 1, 8, width, self.depth, num_heads=2, hidden=2 * width)
        if not norm:
            self.network.stem[1] = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class DeepClassifier(TransformerClassifier):
    """A vision transformer that some blocks can be pruned of."""

    depth = 3


class MomentumClassifier(Classifier):
    """Two views of an image are to be told alike by a network and by an average of it, which follows at each step."""

    def __init__(self, width: int = 12, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.online = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(nn.Linear(8 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 8))
        self.predictor = nn.Linear(8, 8)
        self.head = nn.Linear(8 * width, 4)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.online(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        for average, network in ((self.momentum, self.online), (self.momentum_projector, self.projector)):
            for one, other in zip(average.parameters(), network.parameters(), strict=True):
                one.data.lerp_(other.data, 0.1)
        with torch.no_grad():
            told = self.momentum_projector(self.momentum(batch[0].flip(-1)))
        foretold = self.predictor(self.projector(self.online(batch[0])))
        return super().training_step(batch, batch_idx) - F.cosine_similarity(foretold, told).mean()


NETWORKS: dict[str, type[Classifier]] = {
    "vit": TransformerClassifier, "blocks": DeepClassifier, "momentum_encoder": MomentumClassifier,
}  # fmt: skip


def network_of(name: str) -> type[Classifier]:
    """Return the class of the module that a row is put through."""
    return NETWORKS.get(name, ResidualClassifier)


class ResumableLoader(DataLoader):
    """A loader in a fixed order that remembers its position, as Lightning asks of loaders that resume mid-epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(position=0, start=0)

    def __iter__(self) -> Iterator[Any]:
        start, self.__dict__["start"] = self.__dict__["start"], 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.__dict__["position"] = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.__dict__["position"]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__["start"] = state["position"] % len(self)


def images(count: int) -> TensorDataset:
    """Four classes of 8x8 images that a small network can tell apart, always the same."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    marks = torch.zeros(count, 1, 8, 8)
    for corner in range(4):
        rows, columns = 4 * (corner // 2), 4 * (corner % 2)
        marks[labels == corner, :, rows : rows + 4, columns : columns + 4] = 1.0
    return TensorDataset(noise + marks, labels)


def loaders(batch_size: int = 16, rank: int = 0, ranks: int = 1) -> tuple[DataLoader, DataLoader]:
    """Return a training loader of `BATCHES` batches of 16 images, which ranks share, and a validation loader."""
    training = images(16 * BATCHES)
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(training, ranks, rank, shuffle=False) if ranks > 1 else None
    return ResumableLoader(training, batch_size // ranks, sampler=sampler), DataLoader(images(64), 32)


def train(
    root: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    module: L.LightningModule | type[L.LightningModule] = ResidualClassifier,
    **trainer: Any,
) -> tuple[L.LightningModule, L.Trainer]:
    """Train from a fixed seed and keep a checkpoint of every epoch; on as many ranks as the trainer has.

    A class is made a module after the seed has been set.
    """
    L.seed_everything(0, verbose=False)
    module = module() if isinstance(module, type) else module
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }  # fmt: skip
    made = list(callbacks)
    if not any(isinstance(callback, ModelCheckpoint) for callback in made):
        made.append(ModelCheckpoint(root / "checkpoints", filename="{epoch}-{step}", save_top_k=-1))
    runner = L.Trainer(callbacks=made, **{**settings, **trainer})
    served = loaders(rank=runner.global_rank, ranks=runner.world_size)
    runner.fit(module, *served, ckpt_path=ckpt_path)
    return module, runner


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Name the tensors that are not the same, bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    return [name for name in left.keys() | right.keys() if name not in left or not torch.equal(left[name], right[name])]
