"""Ask 40 networks for five budgets at three roundings, and see what is kept of each.

Widths alone are planned, by the magnitude of freshly drawn weights; nothing is pruned. A gap is what is kept less than
was asked for, in points of the original FLOPs. Budgets below what the rounding can reach are refused, and counted. The
page is written beside the file of results, which is added to as it comes::

    python benchmarks/budgets.py [--results FILE] [networks ...]
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import stored
import torch
from torch import Tensor

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import build_network

RESULTS = Path(__file__).parent / "results" / "budgets.json"
BUDGETS = (0.35, 0.5, 0.65, 0.8, 0.9)
ROUNDINGS = (1, 8, 16)
GOAL = 1.0  # point: what the median gap has to be below
OWN = {
    "lenet": (1, 28), "conv4": (1, 28), "alexnet": (3, 32), "digits": (1, 8), "mobilenet_v1": (3, 32),
    "mobilenet_v2": (3, 32), "vit": (3, 32), "resnet20": (3, 32), "resnet56": (3, 32), "resnet18": (3, 32),
    "resnet34": (3, 32), "vgg11_bn": (3, 32), "vgg16_bn": (3, 32),
}  # fmt: skip
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_b3", "efficientnet_v2_s", "googlenet",
    "inception_v3", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "swin_t", "vgg11", "vgg16_bn",
)  # fmt: skip
NAMES = [*OWN, *(f"torchvision/{name}" for name in TORCHVISION)]


def shape_of(name: str) -> tuple[int, int, int, int]:
    """Return the shape of an image of a network."""
    if name in OWN:
        channels, size = OWN[name]
        return 1, channels, size, size
    size = {"torchvision/inception_v3": 299, "torchvision/swin_t": 224, "torchvision/alexnet": 224}.get(name, 96)
    return 1, 3, size, size


def asked(name: str) -> dict[str, Any]:
    """Plan each budget at each rounding; returns what is kept, and the group that is finer if there is one."""
    torch.manual_seed(0)
    arguments = {"in_channels": OWN[name][0]} if name in OWN else {}
    model = build_network(name, **arguments).eval()
    graph = lp.trace(model, torch.zeros(shape_of(name)))
    scores = lp.criteria.magnitude(graph)
    start = time.perf_counter()
    kept = {
        f"{round_to} | {keep}": planned(graph, scores, keep, round_to) for round_to in ROUNDINGS for keep in BUDGETS
    }
    return {"kept": kept, "seconds": time.perf_counter() - start}


def planned(graph: ChannelGraph, scores: dict[str, Tensor], keep: float, round_to: int) -> dict[str, Any] | None:
    """Return what a plan keeps, and which group is finer if one is; None where the budget cannot be reached."""
    try:
        budget = lp.plan(graph, scores, keep, round_to=round_to).budget
    except ValueError:  # with the range that can
        return None
    return {"kept": budget["achieved"], "finer": budget.get("finer")}


def gaps(records: dict[str, Any], round_to: int) -> dict[tuple[str, float], float]:
    """Return the gap of each network and budget, in points."""
    found = {}
    for name, record in records.items():
        for keep in BUDGETS:
            budget = record["kept"][f"{round_to} | {keep}"]
            if budget is not None:
                found[name, keep] = 100 * (keep - budget["kept"])
    return found


def is_finer(record: dict[str, Any], round_to: int, keep: float) -> bool:
    """Tell whether a plan has a group of a finer multiple."""
    plan = record["kept"][f"{round_to} | {keep}"]
    return plan is not None and plan["finer"] is not None


def page(records: dict[str, Any]) -> str:
    """Return how far below what was asked for is kept, by rounding and by network."""
    lines = [
        "# Budgets",
        "",
        f"What is kept less than was asked for, in points of the FLOPs: {len(records)} networks with freshly drawn "
        f"weights, keep = {', '.join(map(str, BUDGETS))}. Medians have to be below {GOAL:g} point.",
        "",
        "| `round_to` | plans | refused | median gap | 9 of 10 are below | largest gap | where | one group finer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for round_to in ROUNDINGS:
        found = gaps(records, round_to)
        ordered = sorted(found.values())
        name, keep = max(found, key=found.__getitem__)
        cells = [
            round_to, len(found), len(records) * len(BUDGETS) - len(found), f"{statistics.median(ordered):.3f}",
            f"{ordered[int(0.9 * len(ordered))]:.2f}", f"{ordered[-1]:.2f}", f"`{name}`, keep {keep}",
            sum(is_finer(record, round_to, keep) for record in records.values() for keep in BUDGETS),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    heads = " | ".join(f"largest gap at {round_to}" for round_to in ROUNDINGS)
    lines += ["", f"| network | {heads} | seconds for all plans |", "|---|" + "---|" * (len(ROUNDINGS) + 1)]
    for name, record in records.items():
        cells = []
        for round_to in ROUNDINGS:
            found = gaps({name: record}, round_to)
            cells.append(f"{max(found.values()):.2f}" if found else "refused")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {record['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")  # of gaps, which the page tells
    torch.set_num_threads(1)
    made = stored.made_with(settings)
    records = stored.load(settings.results)
    for name in settings.networks:
        if name not in records:
            records[name] = {**asked(name), "made": made}
            stored.save(settings.results, records)
            print(name, max(gaps({name: records[name]}, 8).values(), default=0), records[name]["seconds"], flush=True)
    stored.save_page(settings.results, page(records))
    print(page(records))


if __name__ == "__main__":
    main()
