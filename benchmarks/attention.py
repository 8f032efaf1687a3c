"""Count what is free in networks with attention, and compare each kind of channels with its masked twin.

For each network: the share of channels that can be pruned, and the shares that can be as heads, as the width of
queries and keys, as that of values, as the stream and as all others (a row of a layer of queries may go with its head
and with its place in all heads, so that they add up to more); and how far pruning channels of each kind, drawn at
random, is from masking them, in float64 and relative to the largest output. Nothing is told to the library but the
inputs. Beside it, the share of channels that Torch-Pruning and torch-kirigami take out when they are asked for half of
all, times two, or what they raise: out of the box, and Torch-Pruning with the number of heads of each layer, heads
pruned too, and the last layer left out, as its documentation asks; that of torch-kirigami asks for a rule for each
operator instead.

Networks are as their makers build them, with few layers. They come from packages in an environment of their own::

    python -m venv free && free/bin/pip install -e .[benchmark] timm transformers torch-kirigami
    free/bin/python benchmarks/attention.py [--results benchmarks/results/attention.json] [networks ...]

Each network has a process of its own. A run that is stopped goes on where it was. The page is written beside the file.
"""

import argparse
import copy
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import stored
import torch
from free_channels import LIMIT, LONGEST, PATIENCE, PATIENCE_WITH_OTHERS, at_most, channels_of, shares, taken_out
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine import randomised
from masked_twin import draw_pruned, judge

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import CostModel

RESULTS = Path(__file__).parent / "results" / "attention.json"
KINDS = ("heads", "query-key", "value", "stream")
OTHERS = "MLP and others"
PATIENCE_WITH_KIRIGAMI = 40  # seconds; it looks at every channel alone
DRAWN = 2  # prunings of each kind
Built = tuple[nn.Module, tuple[Any, ...]]
COLUMNS = [
    "network", "trace (s)", "free", *(f"as {kind}" for kind in (*KINDS, OTHERS)), "masked - pruned",
    "why others are not free", "Torch-Pruning", "with all hints", "torch-kirigami",
]  # fmt: skip


# -- the networks ------------------------------------------------------------------------------------------------------


def image(size: int) -> tuple[torch.Tensor]:
    return (torch.randn(1, 3, size, size),)


def of_torchvision(name: str, size: int, **settings: Any) -> Built:
    from torchvision.models import vision_transformer

    if name == "vit":
        return vision_transformer.VisionTransformer(size, 8, 2, 4, 64, 128, num_classes=10), image(size)
    import torchvision

    return torchvision.models.get_model(name, weights=None, **settings), image(size)


def maxvit() -> Built:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], head_dim=8, stochastic_depth_prob=0.0), image(64)


def mvit() -> Built:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    kernel, one, pooled = [3, 3, 3], [1, 1, 1], [1, 2, 2]
    blocks = [
        MSBlockConfig(2, 32, 32, kernel, kernel, one, pooled),
        MSBlockConfig(4, 32, 64, kernel, kernel, pooled, one),
        MSBlockConfig(4, 64, 64, kernel, kernel, one, one),
    ]
    network = MViT((64, 64), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
                   proj_after_attn=True, num_classes=10)  # fmt: skip
    return network, (torch.randn(1, 3, 4, 64, 64),)


def of_timm(name: str, size: int, **settings: Any) -> Built:
    import timm

    return timm.create_model(name, **settings), image(size)


def of_transformers(name: str, size: int, **settings: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}Model")(config), image(size)


def bert() -> Built:
    from transformers import BertConfig, BertModel

    numbers = torch.arange(16)[None]
    config = BertConfig(num_hidden_layers=2, hidden_size=96, num_attention_heads=6, intermediate_size=192)
    return BertModel(config), (numbers, torch.ones_like(numbers))


def detr() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1] * 4, layer_type="basic",
                            out_features=["stage4"])  # fmt: skip
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_queries=7)  # fmt: skip
    return DetrForObjectDetection(config), image(64)


_SMALL = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 192}
NETWORKS: dict[str, Callable[[], Built]] = {
    "torchvision ViT": partial(of_torchvision, "vit", 32),
    "torchvision Swin": partial(of_torchvision, "swin_t", 64),
    "torchvision SwinV2": partial(of_torchvision, "swin_v2_t", 64),
    "torchvision MaxViT": maxvit,
    "torchvision MViT": mvit,
    "timm DeiT": partial(of_timm, "deit_tiny_patch16_224", 224, depth=2),
    "timm ViT with registers": partial(of_timm, "vit_tiny_patch16_224", 224, depth=2, reg_tokens=4),
    "timm CaiT": partial(of_timm, "cait_xxs24_224", 224, depth=2),
    "timm PVTv2": partial(of_timm, "pvt_v2_b0", 224),
    "timm Twins": partial(of_timm, "twins_svt_small", 224, depths=[1, 1, 2, 1]),
    "timm CrossViT": partial(of_timm, "crossvit_9_240", 240),
    "timm EVA": partial(of_timm, "eva02_tiny_patch14_224", 224, depth=2),
    "timm ViT with RoPE": partial(of_timm, "vit_small_patch16_rope_224", 224, depth=2),
    "transformers ViT": partial(of_transformers, "ViT", 32, image_size=32, patch_size=8, **_SMALL),
    "transformers DINOv2": partial(of_transformers, "Dinov2", 28, image_size=28, patch_size=7, num_hidden_layers=2,
                                   hidden_size=96, num_attention_heads=6),
    "transformers Swin": partial(of_transformers, "Swin", 64, image_size=64, embed_dim=24, depths=[2, 2],
                                 num_heads=[2, 4]),
    "transformers SegFormer": partial(of_transformers, "Segformer", 64),
    "transformers CLIP (vision)": partial(of_transformers, "CLIPVision", 32, image_size=32, patch_size=8, **_SMALL),
    "transformers DETR": detr,
    "transformers BERT": bert,
}  # fmt: skip


# -- what is free ------------------------------------------------------------------------------------------------------


def examined(build: Callable[[], Built]) -> dict[str, Any]:
    """Return the record of a network, or what is raised."""
    torch.manual_seed(0)
    record: dict[str, Any] = {"wrong": ""}
    try:
        with at_most(PATIENCE):
            model, inputs = build()
            model = model.eval()
            start = time.process_time()
            graph = lp.trace(model, inputs)
            record["trace"] = time.process_time() - start
            record |= shares(graph)
            record["kinds"] = shares_by_kind(graph, record["exact"] + record["inexact"])
            record["apart"] = apart(model, graph, inputs)
    except Exception as raised:
        record["wrong"] = shown(raised)
    record["theirs"] = theirs(build, hinted=False)
    record["hinted"] = theirs(build, hinted=True)
    record["kirigami"] = theirs(build, hinted=False, taken_out=taken_out_by_kirigami, patience=PATIENCE_WITH_KIRIGAMI)
    return record


def shares_by_kind(graph: ChannelGraph, free: float) -> dict[str, float]:
    """Return the share of channels that can be pruned as each kind: those that none are left of without the kind.

    Args:
        graph: The traced network.
        free: The share that can be pruned as any.
    """
    cost = CostModel(graph, "channels")
    found = {}
    for kind in (*KINDS, OTHERS):
        left = cost(dict.fromkeys(of_kind(graph, kind), 0))
        found[kind] = free * (1 - left / cost.original) if cost.original else 0.0
    return found


def shown(raised: Exception) -> str:
    return f"{type(raised).__name__}: {raised}".splitlines()[0][:80]


def of_kind(graph: ChannelGraph, kind: str) -> list[str]:
    """Return the names of the groups of a kind, where plain channels are of `OTHERS`."""
    names = []
    for name, group in graph.groups.items():
        if kind == (group.kind if group.kind in KINDS else OTHERS):
            names.append(name)
    return names


@torch.no_grad()
def apart(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> dict[str, float]:
    """Return how far pruning the mask-exact groups of each kind is from masking them, at most."""
    model = randomised(copy.deepcopy(model).double()).eval()  # some start with outputs of zero
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    found = {}
    for kind in (*KINDS, OTHERS):
        names = [name for name in of_kind(graph, kind) if graph.groups[name].mask_exact]
        if names:
            drawn = [draw_pruned(graph, names) for _ in range(DRAWN)]
            found[kind] = max(judge(model, graph, pruned, inputs).apart for pruned in drawn)
    return found


# -- other libraries --------------------------------------------------------------------------------------------------


def theirs(
    build: Callable[[], Built],
    hinted: bool,
    taken_out: Callable[..., float] = taken_out,
    patience: int = PATIENCE_WITH_OTHERS,
) -> Any:
    """Return the share of channels that another library can prune, or what is raised.

    Args:
        build: Makes the network.
        hinted: Whether Torch-Pruning gets its hints.
        taken_out: Prunes half of all channels, and returns twice the share that was pruned.
        patience: How many seconds to wait for it.
    """
    try:
        with at_most(patience):
            torch.manual_seed(0)
            model, inputs = build()
            model = model.eval()
            return taken_out(model, inputs, **hints(model) if hinted else {})
    except Exception as raised:
        return shown(raised)


def hints(model: nn.Module) -> dict[str, Any]:
    """Return what its documentation asks to be told, but for other forward functions: heads, and the last layer."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    return {
        "num_heads": heads(model),
        "prune_num_heads": True,
        "prune_head_dims": True,
        "ignored_layers": [last],
    }


def heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the number of heads of each layer that produces queries, keys or values, as its documentation asks."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        count = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if not isinstance(count, int):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[module] = count
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name in PROJECTIONS:
                found[child] = count
    return found


PROJECTIONS = {"qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj"}


def taken_out_by_kirigami(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return twice the share of channels that torch-kirigami takes out: half of each axis of which it can any."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import PlanningError, Pruner

    before = channels_of(model)
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=inputs))
    by_axis = defaultdict(list)
    for candidate in pruner.discover_candidates().candidates:
        by_axis[candidate.axis].append(candidate)
    removed: list[Any] = []
    for candidates in by_axis.values():
        half = [one for candidate in candidates[: len(candidates) // 2] for one in candidate.remove]
        with suppress(PlanningError):
            pruner.plan_remove(half)
            removed += half
    pruner.apply(pruner.plan_remove(removed))
    model(*inputs)
    return 2 * (1 - channels_of(model) / before)


# -- the page ----------------------------------------------------------------------------------------------------------


def page(records: dict[str, Any]) -> str:
    """Return the table of the networks, and what it comes to."""
    lines = ["# Attention", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [row(name, record) for name, record in records.items()]
    free = [record["exact"] + record["inexact"] for record in records.values() if "exact" in record]
    distances = [one for record in records.values() for kind, one in record.get("apart", {}).items() if kind in KINDS]
    if free and distances:
        lines += [
            "",
            f"Free: mean {statistics.mean(free):.3f} of {len(free)} networks, smallest {min(free):.3f}. Largest "
            f"distance of heads, queries and keys, and values from masking: {max(distances):.0e} (limit {LIMIT:.0e}).",
        ]
    return "\n".join(lines) + "\n"


def row(name: str, record: dict[str, Any]) -> str:
    found = (record["theirs"], record["hinted"], record.get("kirigami", "-"))
    others = [f"{one:.2f}" if isinstance(one, float) else one for one in found]
    if "exact" not in record:
        return f"| {name} | {'- | ' * (len(COLUMNS) - 5)}{record['wrong']} | {' | '.join(others)} |"
    kinds = record.get("kinds", {})
    groups = " | ".join(f"{kinds[kind]:.3f}" if kinds else "-" for kind in (*KINDS, OTHERS))
    distances = record.get("apart", {}).values()
    distance = f"{max(distances):.0e}" if distances else record["wrong"] or "-"
    why = "; ".join(f"{reason} {share:.2f}" for reason, share in record["why"].items()) or "-"
    free = f"{record['exact'] + record['inexact']:.3f}"
    return f"| {name} | {record['trace']:.2f} | {free} | {groups} | {distance} | {why} | {' | '.join(others)} |"


def examined_apart(build: Callable[[], Built]) -> dict[str, Any]:
    """Return the record of a network that is examined in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sending.send(examined(build)))
    process.start()
    sending.close()
    record: dict[str, Any] = {"wrong": "its process died", "theirs": "-", "hinted": "-", "kirigami": "-"}
    try:
        if receiving.poll(LONGEST):
            record = receiving.recv()
        else:
            record["wrong"] = f"is not done after {LONGEST} s"
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = stored.load(settings.results)
    made = stored.made_with(settings)
    for name in settings.networks:
        if name not in results or ("exact" in results[name] and "kinds" not in results[name]):
            results[name] = {**examined_apart(NETWORKS[name]), "made": made}
            print(row(name, results[name]), flush=True)
            stored.save(settings.results, results)
            stored.save_page(settings.results, page(results))
    stored.save_page(settings.results, page(results))


if __name__ == "__main__":
    main()
