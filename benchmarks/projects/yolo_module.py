"""ultralytics: the network of YOLO and its own loss and data sets, in a LightningModule."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from case import Case
from synthesised import SIZE, picture, square, write
from torch import Tensor
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

CLASSES = 4


class Yolo(pl.LightningModule):
    """YOLO, trained by its own loss."""

    def __init__(self, network: str = "yolov8n.yaml", lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = DetectionModel(network, nc=CLASSES, verbose=False)
        self.network.args = get_cfg(DEFAULT_CFG)

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["img"] = batch["img"].float() / 255
        loss, _ = self.network.loss(batch)
        self.log("train_loss", loss.sum(), batch_size=len(batch["img"]))
        return loss.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch["img"] = batch["img"].float() / 255
        loss, _ = self.network.loss(batch)
        self.log("val_loss", loss.sum(), batch_size=len(batch["img"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def yolov8(data: Path) -> Case:
    """Squares by their corner, in files as YOLO has them."""
    for split in ("train", "val"):
        for number in range(8):
            write(data / "images" / split / f"{number}.png", picture(number))
            top, left, side = (value / SIZE for value in square(number))
            labels = data / "labels" / split / f"{number}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text(f"{number % CLASSES} {left + side / 2} {top + side / 2} {side} {side}\n")
    described = {"names": dict(enumerate("abcd")), "nc": CLASSES, "channels": 3}

    def loader(split: str) -> Any:
        cfg = get_cfg(DEFAULT_CFG, {"imgsz": SIZE, "task": "detect", "mosaic": 0.0})
        found = build_yolo_dataset(cfg, str(data / "images" / split), 4, described, mode=split)
        return DataLoader(found, batch_size=4, shuffle=split == "train", collate_fn=found.collate_fn)

    return Case(
        module=Yolo,
        data=lambda: {"train_dataloaders": loader("train"), "val_dataloaders": loader("val")},
        monitor="val_loss",
    )
