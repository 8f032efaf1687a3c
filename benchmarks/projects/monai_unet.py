"""MONAI: the LightningModule of its tutorial for the spleen, a 3D U-Net that is validated in sliding windows."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from case import Case
from monai.data import CacheDataset, DataLoader, decollate_batch, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscrete,
    Compose,
    EnsureChannelFirstd,
    EnsureType,
    LoadImaged,
    RandCropByPosNegLabeld,
    ScaleIntensityRanged,
)
from torch import Tensor

PATCH = 32


class Net(pl.LightningModule):
    """The module of the tutorial, which has its data sets too."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self._model = UNet(
            spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), num_res_units=2,
            norm=Norm.BATCH,
        )  # fmt: skip
        self.loss_function = DiceLoss(to_onehot_y=True, softmax=True)
        self.post_pred = Compose([EnsureType("tensor", device="cpu"), AsDiscrete(argmax=True, to_onehot=2)])
        self.post_label = Compose([EnsureType("tensor", device="cpu"), AsDiscrete(to_onehot=2)])
        self.dice_metric = DiceMetric(include_background=False, reduction="mean", get_not_nans=False)
        self.best_val_dice = 0
        self.best_val_epoch = 0
        self.validation_step_outputs: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def prepare_data(self) -> None:
        images = sorted(Path(self.folder).glob("image*.npy"))
        labels = sorted(Path(self.folder).glob("label*.npy"))
        files = [{"image": str(image), "label": str(label)} for image, label in zip(images, labels, strict=True)]
        both = ["image", "label"]
        loading = [
            LoadImaged(keys=both),
            EnsureChannelFirstd(keys=both, channel_dim="no_channel"),
            ScaleIntensityRanged(keys=["image"], a_min=-57, a_max=164, b_min=0.0, b_max=1.0, clip=True),
        ]
        crop = RandCropByPosNegLabeld(
            keys=both, label_key="label", spatial_size=(PATCH, PATCH, PATCH), pos=1, neg=1, num_samples=2,
            image_key="image", image_threshold=0,
        )  # fmt: skip
        self.train_ds = CacheDataset(files[:-2], Compose([*loading, crop]), num_workers=0, progress=False)
        self.val_ds = CacheDataset(files[-2:], Compose(loading), num_workers=0, progress=False)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_ds, batch_size=2, shuffle=True, collate_fn=list_data_collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_ds, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self._model.parameters(), 1e-4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch["image"], batch["label"]
        output = self.forward(images)
        loss = self.loss_function(output, labels)
        return {"loss": loss, "log": {"train_loss": loss.item()}}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch["image"], batch["label"]
        outputs = sliding_window_inference(images, (PATCH, PATCH, PATCH), 4, self.forward)
        loss = self.loss_function(outputs, labels)
        outputs = [self.post_pred(i) for i in decollate_batch(outputs)]
        labels = [self.post_label(i) for i in decollate_batch(labels)]
        self.dice_metric(y_pred=outputs, y=labels)
        d = {"val_loss": loss, "val_number": len(outputs)}
        self.validation_step_outputs.append(d)
        return d

    def on_validation_epoch_end(self) -> None:
        val_loss, num_items = 0, 0
        for output in self.validation_step_outputs:
            val_loss += output["val_loss"].sum().item()
            num_items += output["val_number"]
        mean_val_dice = self.dice_metric.aggregate().item()
        self.dice_metric.reset()
        mean_val_loss = torch.tensor(val_loss / num_items)
        if mean_val_dice > self.best_val_dice:
            self.best_val_dice = mean_val_dice
            self.best_val_epoch = self.current_epoch
        self.log_dict({"val_dice": mean_val_dice, "val_loss": mean_val_loss})
        self.validation_step_outputs.clear()


def spleen(data: Path) -> Case:
    """A bright cube in a dark volume."""
    data.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(6):
        volume = noise.normal(0, 20, (48, 48, 40)).astype(np.float32)
        label = np.zeros(volume.shape, np.uint8)
        start = 4 + 4 * number
        label[start : start + 16, start : start + 16, 10:26] = 1
        np.save(data / f"image{number}.npy", volume + 80 * label)
        np.save(data / f"label{number}.npy", label)
    return Case(
        module=lambda: Net(str(data)), data=dict, monitor="val_loss", given=lambda: {"folder": str(data)},
    )  # fmt: skip
