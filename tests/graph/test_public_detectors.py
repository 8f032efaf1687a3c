"""YOLO, DETR and RT-DETR of their own packages: pruned as they are, and loaded onto the classes that they are of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_prune as lp

pytestmark = pytest.mark.long
SIZE = 64


def yolo(name: str) -> nn.Module:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return tasks.DetectionModel(f"{name}.yaml", verbose=False)


def backbone(transformers: Any, kind: str, stages: list[str]) -> Any:
    settings = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "layer_type": "basic"}
    return getattr(transformers, kind)(**settings, out_features=stages)


def detr() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, num_queries=7,
        backbone_config=backbone(transformers, "ResNetConfig", ["stage4"]), encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.RTDetrConfig(
        backbone_config=backbone(transformers, "RTDetrResNetConfig", ["stage2", "stage3", "stage4"]),
        encoder_in_channels=[24, 32, 48], d_model=32, encoder_hidden_dim=32, decoder_in_channels=[32, 32, 32],
        num_queries=9, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_denoising=0, num_labels=5,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "yolov8n": lambda: yolo("yolov8n"),
    "yolo11n": lambda: yolo("yolo11n"),
    "detr": detr,
    "rt_detr": rt_detr,
}


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = model(images)
    values = list(output.values()) if hasattr(output, "values") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_is_pruned_as_it_is_and_loaded_onto_its_class(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = DETECTORS[name]().float().eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    kinds = [type(module).__qualname__ for module in detector.modules()]
    graph = lp.trace(detector, images)
    report = lp.prune(detector, lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=4))
    assert report.plan.budget is not None
    assert 0.4 < report.plan.budget["achieved"] <= 0.5
    expected = outputs_of(detector, images)
    assert all(values.isfinite().all() for values in expected)
    assert [type(module).__qualname__ for module in detector.modules()] == kinds

    lp.save(detector, tmp_path / "pruned.pt")
    loaded = lp.load(DETECTORS[name]().float(), tmp_path / "pruned.pt").eval()
    again = outputs_of(loaded, images)
    assert len(again) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
