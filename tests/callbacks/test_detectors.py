"""Detectors of torchvision, pruned whole inside training: backbone, neck and heads, to half of the FLOPs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.export import export
from lightning_prune.pruning_plan import plan_in_force

detection = pytest.importorskip("torchvision.models.detection")

SIZE = 64
CLASSES = 3
KEEP = 0.5


def faster_rcnn() -> nn.Module:
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE,
        rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=50, box_batch_size_per_image=16,
    )  # fmt: skip


def retina_net() -> nn.Module:
    return detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE
    )


def fcos() -> nn.Module:
    return detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=SIZE, max_size=SIZE
    )


def ssd_lite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)


DETECTORS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {  # and what each has that is to be pruned
    "faster_rcnn": (faster_rcnn, {"backbone.body", "backbone.fpn", "rpn.head", "roi_heads.box_head"}),
    "retina_net": (retina_net, {"backbone.body", "backbone.fpn", "head.classification_head", "head.regression_head"}),
    "fcos": (fcos, {"backbone.body", "backbone.fpn", "head.classification_head", "head.regression_head"}),
    "ssd_lite": (ssd_lite, {"backbone.features", "backbone.extra", "head.classification_head", "head.regression_head"}),
}


class Detector(L.LightningModule):
    """Trains a detector on what its own loss says."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = DETECTORS[name][0]()
        self.example_input_array = ([torch.rand(3, SIZE, SIZE)],)

    def forward(self, images: list[Tensor]) -> Any:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        return sum(self.network(images, targets).values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)


def loader() -> DataLoader:
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    target = {"boxes": box, "labels": torch.tensor([1])}
    return DataLoader([(torch.rand(3, SIZE, SIZE), target)] * 8, batch_size=2, collate_fn=_apart)


def _apart(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Prune 1 of 1 leaves hardly any channels")  # of weights that are random
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_pruned_whole_trained_on_reloaded_and_exported_or_refused(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Detector(name)
    graph = lp.trace(module, module.example_input_array)
    touched = {module for group in graph.groups.values() for module in group.modules}
    for part in DETECTORS[name][1]:
        assert any(module.startswith(f"network.{part}") for module in touched), part
    pruning = PruningCallback(keep=KEEP, start_epoch=1)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[pruning, saving],
    )  # fmt: skip
    before = sum(parameter.numel() for parameter in module.parameters())
    trainer.fit(module, loader())
    assert sum(parameter.numel() for parameter in module.parameters()) < before
    now = plan_in_force(module)
    assert KEEP - 0.05 < now.budget["achieved"] <= KEEP
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())

    reloaded = lp.load_pruned(Detector, saving.best_model_path)
    image = [torch.rand(3, SIZE, SIZE)]
    with torch.no_grad():
        found, again = module.eval()(image)[0], reloaded(image)[0]
    assert all(torch.equal(found[key], again[key]) for key in found)

    path = tmp_path / "detector.pt2"
    refused = ""
    try:
        export(module, module.example_input_array, path)
    except (ValueError, RuntimeError) as raised:
        refused = str(raised)
    assert path.exists() != ("Detector" in refused)
