"""Networks with attention of public packages, small but of the classes that their makers wrote, with their inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Built"]

Built = tuple[nn.Module, Any]


def _image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size)


# -- torchvision -------------------------------------------------------------------------------------------------------


def _vit() -> Built:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10), _image(32)


def _swin(version: str) -> Built:
    from torchvision.models import swin_transformer as swin

    blocks = {"1": swin.SwinTransformerBlock, "2": swin.SwinTransformerBlockV2}
    merging = {"1": swin.PatchMerging, "2": swin.PatchMergingV2}
    network = swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[4, 4],
        block=blocks[version],
        downsample_layer=merging[version],
        num_classes=10,
    )
    return network, _image(64)


def _maxvit() -> Built:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10), _image(64)


def _mvit() -> Built:
    from torchvision.models.video import mvit

    settings = [
        mvit.MSBlockConfig(1, 24, 48, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        mvit.MSBlockConfig(2, 48, 48, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    network = mvit.MViT((32, 32), 4, settings, True, True, True, False, num_classes=10)
    return network, torch.randn(1, 3, 4, 32, 32)


# -- timm --------------------------------------------------------------------------------------------------------------


def _timm(name: str, size: int, **settings: Any) -> Built:
    import timm

    return timm.create_model(name, num_classes=10, **settings), _image(size)


# -- transformers ------------------------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def _transformers(name: str, inputs: Callable[[], Any], **settings: Any) -> Built:
    import transformers

    config = getattr(transformers, name.replace("Model", "Config"))(**settings)
    return getattr(transformers, name)(config), inputs()


def _detr() -> Built:
    import transformers

    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    )
    return transformers.DetrModel(config), {"pixel_values": _image(64), "pixel_mask": torch.ones(2, 64, 64).long()}


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(14).view(2, 7)}


NETWORKS: dict[str, Callable[[], Built]] = {
    "torchvision ViT": _vit,
    "torchvision Swin": partial(_swin, "1"),
    "torchvision SwinV2": partial(_swin, "2"),
    "torchvision MaxViT": _maxvit,
    "torchvision MViT": _mvit,
    "timm DeiT": partial(_timm, "deit_tiny_patch16_224", 32, img_size=32, depth=2),
    "timm DeiT, distilled": partial(_timm, "deit_tiny_distilled_patch16_224", 32, img_size=32, depth=2),
    "timm ViT with registers": partial(
        _timm, "vit_small_patch14_reg4_dinov2", 56, img_size=56, depth=2, embed_dim=48, num_heads=4
    ),
    "timm CaiT": partial(_timm, "cait_xxs24_224", 32, img_size=32, depth=2),
    "timm Swin": partial(_timm, "swin_tiny_patch4_window7_224", 56, img_size=56, depths=(2, 2), num_heads=(3, 6)),
    "timm PVTv2": partial(_timm, "pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
    "timm Twins PCPVT": partial(_timm, "twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1)),
    "timm Twins SVT": partial(_timm, "twins_svt_small", 224, depths=(2, 2, 2, 2)),
    "timm CrossViT": partial(_timm, "crossvit_tiny_240", 240),
    "timm EVA-02": partial(
        _timm, "eva02_tiny_patch14_224", 56, img_size=56, depth=2, embed_dim=48, num_heads=4, mlp_ratio=2
    ),
    "timm ViT with RoPE": partial(
        _timm, "vit_base_patch16_rope_reg1_gap_256", 64, img_size=64, depth=2, embed_dim=48, num_heads=4
    ),
    "transformers ViT": partial(_transformers, "ViTModel", lambda: {"pixel_values": _image(32)}, **_SMALL),
    "transformers DINOv2": partial(_transformers, "Dinov2Model", lambda: {"pixel_values": _image(32)}, **_SMALL),
    "transformers Swin": partial(
        _transformers,
        "SwinModel",
        lambda: {"pixel_values": _image(32)},
        image_size=32,
        patch_size=2,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=4,
    ),
    "transformers SegFormer": partial(
        _transformers,
        "SegformerModel",
        lambda: {"pixel_values": _image(64)},
        hidden_sizes=[16, 32, 40, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 5, 8],
    ),
    "transformers DETR": _detr,
    "transformers CLIP vision": partial(
        _transformers, "CLIPVisionModel", lambda: {"pixel_values": _image(32)}, **_SMALL
    ),
    "transformers BERT": partial(
        _transformers, "BertModel", _tokens, **{**_SMALL, "vocab_size": 30, "max_position_embeddings": 20}
    ),
}
