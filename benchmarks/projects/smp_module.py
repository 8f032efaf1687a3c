"""segmentation_models_pytorch: the LightningModule of its example, with a U-Net and its Dice loss."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import segmentation_models_pytorch as smp
import torch
from case import Case
from PIL import Image
from synthesised import mask, picture, write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Pets(Dataset[Any]):
    """Pictures and trimaps in the folders of the Oxford pets."""

    def __init__(self, root: Path) -> None:
        self.names = sorted(path.stem for path in (root / "images").glob("*.png"))
        self.root = root

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        image = np.array(Image.open(self.root / "images" / f"{name}.png"), dtype=np.float32)
        trimap = np.array(Image.open(self.root / "annotations" / f"{name}.png"))
        return {"image": np.moveaxis(image, -1, 0), "mask": (trimap > 0).astype(np.float32)[None], "filename": name}


class PetModel(pl.LightningModule):
    """The module of the library's example."""

    def __init__(self, arch: str, encoder_name: str, in_channels: int, out_classes: int, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = smp.create_model(
            arch, encoder_name=encoder_name, in_channels=in_channels, classes=out_classes, **kwargs
        )
        # `get_preprocessing_params` of the example would ask a hub for these.
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
        self.training_step_outputs: list[Any] = []
        self.validation_step_outputs: list[Any] = []

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean) / self.std
        return self.model(image)

    def shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        image = batch["image"]
        assert image.ndim == 4
        h, w = image.shape[2:]
        assert h % 32 == 0
        assert w % 32 == 0
        mask = batch["mask"]
        assert mask.ndim == 4
        assert mask.max() <= 1.0
        assert mask.min() >= 0
        logits_mask = self.forward(image)
        loss = self.loss_fn(logits_mask, mask)
        pred_mask = (logits_mask.sigmoid() > 0.5).float()
        tp, fp, fn, tn = smp.metrics.get_stats(pred_mask.long(), mask.long(), mode="binary")
        return {"loss": loss, "tp": tp, "fp": fp, "fn": fn, "tn": tn}

    def shared_epoch_end(self, outputs: list[Any], stage: str) -> None:
        counts = [torch.cat([x[name] for x in outputs]) for name in ("tp", "fp", "fn", "tn")]
        per_image_iou = smp.metrics.iou_score(*counts, reduction="micro-imagewise")
        dataset_iou = smp.metrics.iou_score(*counts, reduction="micro")
        metrics = {f"{stage}_per_image_iou": per_image_iou, f"{stage}_dataset_iou": dataset_iou}
        self.log_dict(metrics, prog_bar=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        train_loss_info = self.shared_step(batch, "train")
        self.training_step_outputs.append(train_loss_info)
        return train_loss_info

    def on_train_epoch_end(self) -> None:
        self.shared_epoch_end(self.training_step_outputs, "train")
        self.training_step_outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        valid_loss_info = self.shared_step(batch, "valid")
        self.validation_step_outputs.append(valid_loss_info)
        return valid_loss_info

    def on_validation_epoch_end(self) -> None:
        self.shared_epoch_end(self.validation_step_outputs, "valid")
        self.validation_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def pets(data: Path) -> Case:
    """What is pet in a picture."""
    for split in ("train", "valid"):
        for number in range(8):
            write(data / split / "images" / f"{number}.png", picture(number))
            write(data / split / "annotations" / f"{number}.png", mask(number))

    def loaders() -> dict[str, Any]:
        train = DataLoader(Pets(data / "train"), batch_size=4, shuffle=True)
        return {"train_dataloaders": train, "val_dataloaders": DataLoader(Pets(data / "valid"), batch_size=4)}

    return Case(
        module=lambda: PetModel("FPN", "resnet18", in_channels=3, out_classes=1, encoder_weights=None),
        data=loaders,
        monitor="valid_dataset_iou",
        mode="max",
    )
