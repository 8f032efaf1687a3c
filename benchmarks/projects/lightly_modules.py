"""lightly: its examples for SimCLR, BYOL and DINO, on a folder of pictures; they import pytorch_lightning."""

import copy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from case import Case
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, DINOTransform, SimCLRTransform
from lightly.utils.scheduler import cosine_schedule
from synthesised import picture, write
from torch import Tensor, nn
from torch.utils.data import DataLoader


def resnet() -> nn.Module:
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])


class SimCLR(pl.LightningModule):
    """Two views of a picture are to be alike."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet()
        self.projection_head = SimCLRProjectionHead(512, 2048, 2048)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        (x0, x1) = batch[0]
        z0 = self.forward(x0)
        z1 = self.forward(x1)
        return self.criterion(z0, z1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class BYOL(pl.LightningModule):
    """What one network makes of a view is to be foretold from another view; it follows by momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet()
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x).flatten(start_dim=1)
        z = self.projection_head(y)
        return self.prediction_head(z)

    def forward_momentum(self, x: Tensor) -> Tensor:
        y = self.backbone_momentum(x).flatten(start_dim=1)
        z = self.projection_head_momentum(y)
        return z.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        (x0, x1) = batch[0]
        p0 = self.forward(x0)
        z0 = self.forward_momentum(x0)
        p1 = self.forward(x1)
        z1 = self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class DINO(pl.LightningModule):
    """A student is to say of small views what its teacher, which follows it, says of large ones."""

    def __init__(self) -> None:
        super().__init__()
        backbone = resnet()
        self.student_backbone = backbone
        self.student_head = DINOProjectionHead(512, 512, 64, 2048, freeze_last_layer=1)
        self.teacher_backbone = copy.deepcopy(backbone)
        self.teacher_head = DINOProjectionHead(512, 512, 64, 2048)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.student_backbone(x).flatten(start_dim=1)
        return self.student_head(y)

    def forward_teacher(self, x: Tensor) -> Tensor:
        y = self.teacher_backbone(x).flatten(start_dim=1)
        return self.teacher_head(y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.student_backbone, self.teacher_backbone, m=momentum)
        update_momentum(self.student_head, self.teacher_head, m=momentum)
        views = batch[0]
        views = [view.to(self.device) for view in views]
        global_views = views[:2]
        teacher_out = [self.forward_teacher(view) for view in global_views]
        student_out = [self.forward(view) for view in views]
        return self.criterion(teacher_out, student_out, epoch=self.current_epoch)

    def on_after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.001)


def simclr(data: Path) -> Case:
    return _case(data, SimCLR, SimCLRTransform(input_size=32))


def byol(data: Path) -> Case:
    views = BYOLView1Transform(input_size=32, gaussian_blur=0.0), BYOLView2Transform(input_size=32, gaussian_blur=0.0)
    return _case(data, BYOL, BYOLTransform(view_1_transform=views[0], view_2_transform=views[1]))


def dino(data: Path) -> Case:
    return _case(data, DINO, DINOTransform(global_crop_size=32, local_crop_size=16))


def _case(data: Path, module: Any, transform: Any) -> Case:
    for number in range(12):
        write(data / "pictures" / f"{number}.png", picture(number))

    def loader() -> dict[str, Any]:
        pictures = LightlyDataset(str(data / "pictures"), transform=transform)
        return {"train_dataloaders": DataLoader(pictures, batch_size=4, shuffle=True, drop_last=True)}

    return Case(module=module, data=loader, lightning=pl)
