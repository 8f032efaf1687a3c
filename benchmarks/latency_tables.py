"""How near the time that is predicted for a plan is to the time that its network takes, in torch and in ONNX Runtime.

Each network of torchvision has freshly drawn weights and is profiled once in each runtime, as budgets of latency are.
Then random plans are drawn, from random scores whose size differs by group and to a random fraction of the FLOPs; each
is applied to a copy, and copy and whole network are timed turn and turn about, one image at a time on one thread.
Predicted and measured are fractions of the time of the whole network. The mark is nn-Meter's: 99 % of the networks
within 10 % of what is measured. The page is written beside the file of results, which is added to as it comes::

    python benchmarks/latency_tables.py [--plans 200] [--turns 5] [--results FILE] [--networks resnet18 ...]
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import stored
import torch
import torchvision
from torch import nn

import lightning_prune as lp
from lightning_prune.export.latency_pack import write_pack
from lightning_prune.export.latency_table import measure_pack
from lightning_prune.export.runtimes import ready_in
from lightning_prune.graph import ChannelGraph
from lightning_prune.planning import profile
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.spread import ratios
from lightning_prune.planning.tables import TABLE, table_of, use_table
from lightning_prune.planning.timing import median_time, times_in_turns
from lightning_prune.pruning_plan import PruningPlan

RESULTS = Path(__file__).parent / "results" / "latency_tables.json"
NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "squeezenet1_1", "densenet121")
RUNTIMES = {"torch": "latency", "onnxruntime": TABLE}
IMAGE = (1, 3, 224, 224)
NEAR, MARK = 0.1, 0.99
KEPT = (0.2, 0.95)  # of the FLOPs, by a plan


def profiled(name: str, runtime: str, folder: Path) -> ChannelGraph:
    """Return a traced network that knows what time its widths take in a runtime."""
    torch.manual_seed(0)
    graph = lp.trace(torchvision.models.get_model(name, weights=None).eval(), torch.zeros(IMAGE))
    if runtime == "torch":
        profile(graph)
        return graph
    pack = folder / "pack.zip"
    write_pack(graph, pack)
    use_table(graph, table_of(measure_pack(pack, torch.get_num_threads())))
    return graph


def random_plan(graph: ChannelGraph, generator: torch.Generator) -> PruningPlan:
    """Draw a plan: how large the scores of a group are is drawn too, so that widths go far apart."""
    scores = {}
    for name, group in graph.groups.items():
        size = 4 ** torch.randn((), generator=generator)
        scores[name] = size * torch.rand(group.size, generator=generator)
    least, most = KEPT
    keep = least + (most - least) * float(torch.rand((), generator=generator))
    return lp.plan(graph, scores, keep=keep, metric="flops", round_to=8)


def in_runtime(runtime: str, model: nn.Module, folder: Path) -> Callable[[], float]:
    """Return what times a network in a runtime, in milliseconds."""
    run = ready_in(runtime, model, torch.zeros(IMAGE), folder)(torch.randn(IMAGE))
    return partial(median_time, run, torch.device("cpu"), 200, 20)


@torch.no_grad()
def measured(name: str, runtime: str, plans: int, turns: int) -> dict[str, Any]:
    """Return what was predicted and measured of random plans, as fractions of the time of the whole network."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        graph = profiled(name, runtime, folder)
        cost = CostModel(graph, RUNTIMES[runtime])
        whole = in_runtime(runtime, copy.deepcopy(graph.model), folder)
        generator = torch.Generator().manual_seed(1)
        rows = []
        for _ in range(plans):
            plan = random_plan(graph, generator)
            pruned = copy.deepcopy(graph.model)
            lp.prune(pruned, plan)
            of_whole, of_pruned = times_in_turns([whole, in_runtime(runtime, pruned, folder)], turns)
            predicted = cost(plan.widths) / cost.original
            rows.append([predicted, ratios(of_pruned, of_whole).median, plan.budget["achieved"]])
    predicted, taken, flops = zip(*rows, strict=True)
    return {"predicted": predicted, "measured": taken, "flops": flops}


def errors(record: dict[str, Any], by: str = "predicted") -> np.ndarray:
    """Return how far each plan is off, as a part of the time that is measured."""
    return np.abs(np.array(record[by]) / np.array(record["measured"]) - 1)


def page(records: dict[str, Any]) -> str:
    """Return how near predictions come, in each runtime and over all."""
    lines = [
        "# Predicted and measured time",
        "",
        "Random plans at 0.2 to 0.95 of the FLOPs, one image of 224 x 224, one thread; fractions of the time of the "
        "whole network. FLOPs alone: how far off one is who takes the fraction of the FLOPs for that of the time.",
        "",
        "| network | runtime | plans | within 5 % | within 10 % | median error | largest | FLOPs alone, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(*key.split(" | "), [record]) for key, record in records.items()]
    for runtime in RUNTIMES:
        of_runtime = [record for key, record in records.items() if key.endswith(f" | {runtime}")]
        lines += [_row("all", runtime, of_runtime)] if of_runtime else []
    return "\n".join([*lines, "", f"The mark is {MARK:.0%} within {NEAR:.0%}."]) + "\n"


def _row(name: str, runtime: str, records: list[dict[str, Any]]) -> str:
    found = np.concatenate([errors(record) for record in records])
    flops = np.concatenate([errors(record, "flops") for record in records])
    within = [f"{(found <= limit).mean():.3f}" for limit in (NEAR / 2, NEAR)]
    shares = [f"{value:.3f}" for value in (np.median(found), found.max(), np.median(flops))]
    return f"| {name} | {runtime} | {len(found)} | {' | '.join([*within, *shares])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--plans", type=int, default=200, help="in all, over networks and runtimes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    made = stored.made_with(settings)
    each = settings.plans // (len(NETWORKS) * len(RUNTIMES))
    runs = {
        f"{name} | {runtime}": partial(measured, name, runtime, each, settings.turns)
        for name in settings.networks
        for runtime in RUNTIMES
    }
    stored.complete_page(settings.results, runs, made, page)


if __name__ == "__main__":
    main()
