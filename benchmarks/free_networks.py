"""Networks of public packages by family, built small or as their makers set them, with the inputs that they take.

Each is a function that imports its package when it is called; a package that is not installed fails there.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import timm_networks

__all__ = ["FAMILIES", "Built"]

Built = tuple[nn.Module, tuple[Any, ...]]
SEED, DRAWN = 19, 80


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, size, size)


def _timm() -> Iterator[tuple[str, Callable[[], Built]]]:
    count = 0
    for name in timm_networks.drawn(SEED):
        if count == DRAWN:
            return
        if timm_networks.is_small(name):
            count += 1
            yield name, partial(_of_timm, name)


def _of_timm(name: str) -> Built:
    model, x = timm_networks.network(name)
    return model, (x,)


def _segmentation() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name in ["Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet", "MAnet", "PAN",
                 "UPerNet", "Segformer", "DPT"]:  # fmt: skip
        yield name, partial(_of_segmentation, name)


def _of_segmentation(name: str) -> Built:
    import segmentation_models_pytorch as smp

    encoder = "tu-vit_tiny_patch16_224" if name == "DPT" else "resnet18"
    settings = {"dynamic_img_size": True} if name == "DPT" else {}
    return getattr(smp, name)(encoder, encoder_weights=None, **settings), (image(224 if name == "DPT" else 128),)


def _transformers() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name in ["ViT", "DeiT", "Beit", "Dinov2", "Swin", "Swinv2", "ConvNext", "ConvNextV2", "Segformer", "Pvt",
                 "PvtV2", "MobileViT", "MobileNetV2", "ResNet", "RegNet", "PoolFormer", "Levit",
                 "FocalNet"]:  # fmt: skip
        yield name, partial(_of_transformers, name)
    yield "BERT", _bert


def _of_transformers(name: str) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")()
    size = getattr(config, "image_size", 64)
    return getattr(transformers, f"{name}Model")(config), (image(size if isinstance(size, int) else size[0]),)


def _bert() -> Built:
    from transformers import BertConfig, BertModel

    numbers = torch.arange(16)[None]
    return BertModel(BertConfig(num_hidden_layers=4)), (numbers, torch.ones_like(numbers))


def _yolo() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name in ("yolov8n", "yolov8n-seg", "yolov8n-cls", "yolo11n", "yolo11n-seg", "yolo11n-cls"):
        yield name, partial(_of_ultralytics, name)


def _of_ultralytics(name: str) -> Built:
    from ultralytics import YOLO

    return YOLO(f"{name}.yaml").model.float(), (image(64),)


def _detection() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name in ["fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
                 "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "maskrcnn_resnet50_fpn",
                 "keypointrcnn_resnet50_fpn"]:  # fmt: skip
        yield name, partial(_of_detection, name)


def _of_detection(name: str) -> Built:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    if hasattr(model.transform, "min_size") and "ssd" not in name:
        model.transform.min_size, model.transform.max_size = (96,), 128
    return model, ([torch.rand(3, 96, 96)],)


def _video() -> Iterator[tuple[str, Callable[[], Built]]]:
    for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v2_s", "swin3d_t"):
        yield name, partial(_of_video, name)
    yield "raft_small", partial(_of_flow, "raft_small")
    yield "raft_large", partial(_of_flow, "raft_large")


def _of_video(name: str) -> Built:
    import torchvision

    frames, size = (16, 224) if name in ("mvit_v2_s", "s3d") else (16, 64)
    return torchvision.models.get_model(name, weights=None), (torch.randn(1, 3, frames, size, size),)


def _of_flow(name: str) -> Built:
    import torchvision

    return torchvision.models.get_model(name, weights=None), (image(128), image(128))


def _monai() -> Iterator[tuple[str, Callable[[], Built]]]:
    from monai.networks import nets

    volume = torch.randn(1, 1, 32, 32, 32)
    two = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    kernels, strides = [3, 3, 3], [1, 2, 2]
    made: dict[str, Callable[[], nn.Module]] = {
        "UNet": lambda: nets.UNet(**two, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2),
        "BasicUNet": lambda: nets.BasicUNet(**two),
        "AttentionUnet": lambda: nets.AttentionUnet(**two, channels=(16, 32, 64), strides=(2, 2)),
        "SegResNet": lambda: nets.SegResNet(**two),
        "DynUNet": lambda: nets.DynUNet(3, 1, 2, kernels, strides, strides[1:]),
        "VNet": nets.VNet,
        "HighResNet": lambda: nets.HighResNet(**two),
        "DenseNet121": lambda: nets.DenseNet121(**two),
        "SENet154": lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2),
        "SwinUNETR": lambda: nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
    }
    for name, make in made.items():
        yield name, partial(_with, make, volume)


def _with(make: Callable[[], nn.Module], *inputs: Any) -> Built:
    return make(), inputs


def _diffusers() -> Iterator[tuple[str, Callable[[], Built]]]:
    import diffusers

    step = torch.tensor([3])
    widths = (32, 64, 64, 128)
    yield (
        "UNet2DModel",
        lambda: _with(lambda: diffusers.UNet2DModel(sample_size=32, block_out_channels=widths), image(32), step),
    )
    yield "UNet2DConditionModel", lambda: _with(
        lambda: diffusers.UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=32),
        image(32, 4), step, torch.randn(1, 7, 32),
    )  # fmt: skip
    yield "AutoencoderKL", lambda: _with(
        lambda: diffusers.AutoencoderKL(block_out_channels=(32, 64),
                                        down_block_types=("DownEncoderBlock2D",) * 2,
                                        up_block_types=("UpDecoderBlock2D",) * 2),
        image(32),
    )  # fmt: skip


def _audio() -> Iterator[tuple[str, Callable[[], Built]]]:
    from torchaudio import models

    features, lengths = torch.randn(2, 32, 80), torch.tensor([32, 24])
    yield "Conformer", lambda: _with(lambda: models.Conformer(80, 4, 128, 2, 31), features, lengths)
    yield "DeepSpeech", lambda: _with(lambda: models.DeepSpeech(80, n_hidden=256), features[:, None])
    yield (
        "Wav2Letter",
        lambda: _with(lambda: models.Wav2Letter(input_type="mfcc", num_features=80), features.transpose(1, 2)),
    )
    yield "ConvTasNet", lambda: _with(lambda: models.ConvTasNet(msk_num_layers=4), torch.randn(1, 1, 1600))
    yield "WaveRNN", lambda: _with(
        lambda: models.WaveRNN([2, 2, 3], 64, 12, n_res_block=2, n_rnn=64, n_fc=64, n_freq=40),
        torch.randn(1, 1, 12 * 6), torch.randn(1, 1, 40, 10),
    )  # fmt: skip


class Recogniser(nn.Module):
    """Convolutions, two recurrent layers both ways, and a class at each step: what reads text in images."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, behind in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, behind, 3, padding=1), nn.BatchNorm2d(behind), nn.ReLU()]
            layers.append(nn.MaxPool2d((2, 1 if behind == 128 else 2)))
        self.features = nn.Sequential(*layers)
        self.states = nn.LSTM(256, 96, num_layers=2, bidirectional=True)
        self.head = nn.Linear(192, 37)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.flatten(1, 2).permute(2, 0, 1)
        return self.head(self.states(x)[0])


class Temporal(nn.Module):
    """Blocks of causal, dilated convolutions with weights of norms that are learned, and shortcuts around them."""

    def __init__(self, widths: tuple[int, ...] = (8, 32, 32, 64)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        for depth, (before, behind) in enumerate(itertools.pairwise(widths)):
            layers: list[nn.Module] = []
            for width in (before, behind):
                convolution = nn.Conv1d(width, behind, 3, dilation=2**depth)
                norm = nn.utils.parametrizations.weight_norm
                layers += [nn.ConstantPad1d((2 ** (depth + 1), 0), 0.0), norm(convolution), nn.ReLU(), nn.Dropout(0.1)]
            self.blocks.append(nn.Sequential(*layers))
            self.shortcuts.append(nn.Conv1d(before, behind, 1) if before != behind else nn.Identity())
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = (block(x) + shortcut(x)).relu()
        return self.head(x[:, :, -1])


def _own() -> Iterator[tuple[str, Callable[[], Built]]]:
    yield "CRNN", lambda: (Recogniser(), (torch.randn(1, 1, 32, 64),))
    yield "TCN", lambda: (Temporal(), (torch.randn(2, 8, 40),))


FAMILIES: dict[str, Callable[[], Iterator[tuple[str, Callable[[], Built]]]]] = {
    "sequences": _own,
    "segmentation_models_pytorch": _segmentation,
    "diffusers": _diffusers,
    "torchaudio": _audio,
    "ultralytics": _yolo,
    "torchvision detection": _detection,
    "torchvision video and flow": _video,
    "MONAI": _monai,
    "transformers": _transformers,
    "timm": _timm,
}
