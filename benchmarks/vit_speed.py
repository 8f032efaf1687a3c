"""Half the FLOPs of a vision transformer: how many times as fast it is in torch and in ONNX Runtime.

torchvision's ViT-B/16 has freshly drawn weights and is pruned to half the FLOPs in two ways: by heads, the width of
queries and keys, that of values, and the hidden channels of MLPs, of which each kind gives the same share; and by
leaving out every other residual block. Both are run against the whole network on random images, turn and turn about on
one thread, one image at a time and eight. The page is written beside the file of results, which is added to::

    python benchmarks/vit_speed.py [--networks vit_b_16] [--batches 1 8] [--turns 9] [--results FILE]
"""

import argparse
import copy
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import stored
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.vision_transformer import VisionTransformer

import lightning_prune as lp
from lightning_prune.export.runtimes import ready_in
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import CostModel
from lightning_prune.planning.spread import ratios
from lightning_prune.planning.timing import median_time, times_in_turns
from lightning_prune.pruning_plan import PruningPlan

RESULTS = Path(__file__).parent / "results" / "vit_speed.json"
RUNTIMES = ("torch", "onnxruntime")
KEEP = 0.5
ROUND_TO = 32  # of heads in twelve, a multiple of 8 of the width of each
SIZES = {"vit_b_16": 224, "tiny": 32}
GOAL = 1.7  # times as fast


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "tiny":  # to try the script out
        return VisionTransformer(32, 8, 4, 4, 64, 128, num_classes=10).eval()
    return get_model(name, weights=None).eval()


def by_kind(graph: ChannelGraph) -> PruningPlan:
    """Plan to keep the same share of each kind of channels, but all of the stream."""
    scores = lp.criteria.magnitude(graph.channels())
    inside = {name: values for name, values in scores.items() if graph.groups[name].kind != "stream"}
    return lp.plan(graph, inside, keep=KEEP, round_to=ROUND_TO, ranking="isomorphic")


def by_blocks(graph: ChannelGraph) -> PruningPlan:
    """Plan to leave out every other block, attention and MLP in turn."""
    return graph.plan(dict.fromkeys(list(graph.blocks)[1::4] + list(graph.blocks)[2::4], torch.arange(0)))


WAYS = {"heads, q-k, v, MLP": by_kind, "blocks": by_blocks}


@torch.no_grad()
def timed(name: str, batch: int, turns: int) -> dict[str, Any]:
    """Time a network in all forms; returns milliseconds of each turn, and the FLOPs that are kept."""
    whole = network(name)
    images = torch.randn(batch, 3, SIZES[name], SIZES[name])
    graph = lp.trace(whole, images[:1], blocks=True)
    cost = CostModel(graph, "flops")
    kept = {}
    forms = {"whole": whole}
    for way, make in WAYS.items():
        plan = make(graph)
        forms[way] = copy.deepcopy(whole)
        lp.prune(forms[way], plan)
        kept[way] = cost(plan.widths) / cost.original
    times: dict[str, dict[str, list[float]]] = {}
    for runtime in RUNTIMES:
        with TemporaryDirectory() as folder:
            runs = []
            for number, model in enumerate(forms.values()):
                place = Path(folder, str(number))
                place.mkdir()
                runs.append(ready_in(runtime, model, images, place)(images))
            every = [partial(median_time, run, torch.device("cpu"), 300, 10) for run in runs]
            times[runtime] = dict(zip(forms, times_in_turns(every, turns), strict=True))
    return {"kept": kept, "ms": times}


def page(records: dict[str, Any]) -> str:
    """Return how many times as fast each form of a network is, with quartiles."""
    lines = [
        "# Half the FLOPs of a vision transformer",
        "",
        "How many times as fast as the whole network, median (quartiles) of turns, and milliseconds of the median: "
        f"random images, one thread, freshly drawn weights. The goal is {GOAL}.",
        "",
        "| network | batch | pruned by | FLOPs kept | runtime | times as fast | ms before | ms after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, record in records.items():
        name, batch = key.split(" | ")
        for way, kept in record["kept"].items():
            for runtime, times in record["ms"].items():
                before, after = times["whole"], times[way]
                cells = [name, batch, way, f"{kept:.3f}", runtime, str(ratios(before, after))]
                cells += [f"{np.median(before):.1f}", f"{np.median(after):.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=["vit_b_16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = stored.made_with(settings)
    del made["settings"]["batches"]  # what is to be run
    runs = {
        f"{name} | {batch}": partial(timed, name, batch, settings.turns)
        for name in settings.networks
        for batch in settings.batches
    }
    stored.complete_page(settings.results, runs, made, page)


if __name__ == "__main__":
    main()
