"""Prune every torchvision classification and segmentation network to half and check each against the design.

For each network, in float64 with random statistics: keep half of the FLOPs and half of the channels (nothing may
break), compare the masked with the pruned network for all exact groups (at most 1e-9 apart, relative), and compare the
counted FLOPs with fvcore's. Prints a table: share of channels that can be pruned, and what is held, with the reasons::

    python benchmarks/zoo.py [networks ...]
"""

import argparse
import copy
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine import counted_flops, difference, random_plan, torchvision_model

import lightning_prune as lp
from lightning_prune.budget import CostModel


def names() -> list[str]:
    models = torchvision.models
    return models.list_models(module=models) + models.list_models(module=models.segmentation)


def size_of(name: str) -> int:
    if name.startswith(("vit", "swin", "maxvit")):
        return 224
    return 299 if name == "inception_v3" else 96


def check(name: str) -> dict[str, object]:
    """Check one network; returns a row of the table."""
    torch.manual_seed(0)
    model = torchvision_model(name)
    size = size_of(name)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    start = time.perf_counter()
    graph = lp.trace(model, x)
    seconds = time.perf_counter() - start
    row: dict[str, object] = {"trace": seconds}
    scores = lp.criteria.magnitude(graph)
    cost = CostModel(graph, "flops")
    row["fvcore"] = "equal" if cost.original == counted_flops(model, x) else "DIFFERENT"
    for metric in ("flops", "channels"):
        plan = lp.plan(graph, scores, 0.5, metric)
        pruned = copy.deepcopy(model)
        lp.prune(pruned, plan)
        if cost(plan.widths) != counted_flops(pruned, x):
            row["fvcore"] = "DIFFERENT"
        row[metric] = plan.budget["achieved"]
        del pruned
    row["difference"] = difference(model, graph, random_plan(graph, exact_only=True), x)
    free = sum(group.size * group.width for group in graph.groups.values())
    held = sum(held.channels for held in graph.held.values())
    row["free"] = free / (free + held)
    row["inexact"] = sum(bool(group.inexact) for group in graph.groups.values())
    row["groups"] = len(graph.groups)
    row["held"] = Counter(held.reason.split(": ", 1)[1] for held in graph.held.values())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=names())
    warnings.simplefilter("ignore")
    print(
        "| network | trace (s) | groups (inexact) | prunable | flops, channels kept | masked - pruned | FLOPs | held |"
    )
    print("|---|---|---|---|---|---|---|---|")
    broken = 0
    for name in parser.parse_args().networks:
        try:
            row = check(name)
        except Exception as raised:
            broken += 1
            print(f"| {name} | BROKEN: {type(raised).__name__}: {str(raised)[:300]} |", flush=True)
            continue
        held = "; ".join(f"{count}x {reason}" for reason, count in row["held"].items())
        print(
            f"| {name} | {row['trace']:.2f} | {row['groups']} ({row['inexact']}) | {row['free']:.0%} "
            f"| {row['flops']:.3f}, {row['channels']:.3f} "
            f"| {row['difference']:.0e} | {row['fvcore']} | {held} |",
            flush=True,
        )
    print(f"{broken} broken")


if __name__ == "__main__":
    main()
