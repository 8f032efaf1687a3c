"""torchgeo: its tasks on its own data modules, whose files are synthesised."""

import json
import zipfile
from pathlib import Path

from case import Case
from synthesised import SIZE, mask, picture, square, write
from torchgeo.datamodules import FireRiskDataModule, LoveDADataModule, VHR10DataModule
from torchgeo.trainers import ClassificationTask, ObjectDetectionTask, SemanticSegmentationTask


def classification(data: Path) -> Case:
    """Fire risk of a place, from its picture."""
    for split in ("train", "val"):
        for number in range(8):
            name = ("Low", "Moderate", "High", "Water")[number % 4]
            write(data / "FireRisk" / split / name / f"{number}.png", picture(number))
    return Case(
        module=lambda: ClassificationTask("resnet18", num_classes=4, lr=1e-3),
        data=lambda: {"datamodule": FireRiskDataModule(batch_size=4, root=data)},
        monitor="val_loss",
    )


def segmentation(data: Path) -> Case:
    """Land cover."""
    for split in ("Train", "Val"):
        for scene in ("Urban", "Rural"):
            for number in range(4):
                write(data / split / scene / "images_png" / f"{number}.png", picture(number))
                write(data / split / scene / "masks_png" / f"{number}.png", mask(number))
    return Case(
        module=lambda: SemanticSegmentationTask("unet", "resnet18", num_classes=8, lr=1e-3),
        data=lambda: {"datamodule": LoveDADataModule(batch_size=4, root=data)},
        monitor="val_loss",
    )


def faster_rcnn(data: Path) -> Case:
    """Objects seen from above, in two steps."""
    return _detection(data, "faster-rcnn")


def retinanet(data: Path) -> Case:
    """The same in one step, with normalisation in groups."""
    return _detection(data, "retinanet")


def _detection(data: Path, model: str) -> Case:
    _write_boxes(data)
    return Case(
        module=lambda: ObjectDetectionTask(model, "resnet18", num_classes=11, trainable_layers=5, lr=1e-4),
        data=lambda: {"datamodule": VHR10DataModule(batch_size=2, patch_size=SIZE, root=data)},
        monitor="val_map",
        mode="max",
    )


def _write_boxes(data: Path, count: int = 8) -> None:
    folder = data / "NWPU VHR-10 dataset"
    images, annotations = [], []
    for number in range(count):
        write(folder / "positive image set" / f"{number + 1:03d}.jpg", picture(number))
        images.append({"id": number, "file_name": f"{number + 1:03d}.jpg", "width": SIZE, "height": SIZE})
        top, left, side = square(number)
        corners = [left, top, left + side, top, left + side, top + side, left, top + side]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1 + number % 4, "bbox": [left, top, side, side],
             "area": side * side, "iscrowd": 0, "segmentation": [corners]}
        )  # fmt: skip
    categories = [{"id": number, "name": str(number)} for number in range(11)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    with zipfile.ZipFile(data / "NWPU VHR-10 dataset.zip", "w"):
        pass  # the data set asks whether the archive is there
