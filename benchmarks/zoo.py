"""Prune every torchvision classification and segmentation network to half and check each against the design.

For each network, in float64 with random statistics: keep half of the FLOPs and half of the channels (nothing may
break), compare the masked with the pruned network for all exact groups (at most 1e-9 apart, relative), and compare the
counted FLOPs with fvcore's. Those are exact but for `einsum`, where fvcore reads four digits of a printed number.
Networks of more than 150 million parameters run in float32 (at most 1e-3 apart), because copies of them in float64
fill the memory of a small machine. Writes a table: the share of channels that can be pruned, and the reasons of
those that cannot be::

    python benchmarks/zoo.py [--table benchmarks/results/zoo.md] [networks ...]
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
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from engine import counted_flops, difference, random_plan, torchvision_model

import lightning_prune as lp
from lightning_prune.planning.cost import CostModel

LARGE = 150_000_000
TABLE = Path(__file__).parent / "results" / "zoo.md"
HEAD = (
    "| network | input | trace (s) | groups (not mask-exact) | prunable | kept of flops, channels | masked - pruned "
    "| FLOPs | unprunable |\n|---|---|---|---|---|---|---|---|---|"
)


def names() -> list[str]:
    models = torchvision.models
    return models.list_models(module=models) + models.list_models(module=models.segmentation)


def size_of(name: str) -> int:
    """Return the smallest input that shows the whole network."""
    if name.startswith(("vit", "swin", "maxvit")):
        return 224
    return 299 if name == "inception_v3" else 96


def built(name: str) -> nn.Module:
    """Return the network with random numbers in it, in float32 if it is large."""
    large = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"] > LARGE
    return torchvision_model(name, torch.float32 if large else torch.float64)


def check(name: str) -> dict[str, object]:
    """Check one network; returns a row of the table."""
    torch.manual_seed(0)
    model = built(name)
    dtype, size = next(model.parameters()).dtype, size_of(name)
    x = torch.randn(2, 3, size, size, dtype=dtype)
    start = time.perf_counter()
    graph = lp.trace(model, x)
    row: dict[str, object] = {"size": size, "trace": time.perf_counter() - start}
    scores = lp.criteria.magnitude(graph)
    cost = CostModel(graph, "flops")
    counts = [(cost.original, counted_flops(model, x))]
    for metric in ("flops", "channels"):
        plan = lp.plan(graph, scores, 0.5, metric)
        pruned = copy.deepcopy(model)
        lp.prune(pruned, plan)
        counts.append((cost(plan.widths), counted_flops(pruned, x)))
        row[metric] = plan.budget["achieved"]
        del pruned
    row["flops apart"] = max(abs(ours - theirs) / theirs for ours, theirs in counts)
    row["difference"] = difference(model, graph, random_plan(graph, exact_only=True), x)
    row["limit"] = 1e-9 if dtype == torch.float64 else 1e-3
    free = CostModel(graph, "channels").original  # of each layer, as those that are unprunable are counted
    fixed = sum(unprunable.channels for unprunable in graph.unprunable.values())
    row["free"] = free / (free + fixed)
    row["not mask-exact"] = sum(not group.mask_exact for group in graph.groups.values())
    row["groups"] = len(graph.groups)
    row["unprunable"] = Counter(each.reason.split(": ", 1)[1] for each in graph.unprunable.values())
    return row


def line(name: str) -> tuple[str, bool]:
    """Return the row of one network as text, and whether all is as it must be."""
    try:
        row = check(name)
    except Exception as raised:
        return f"| {name} | BROKEN: {type(raised).__name__}: {str(raised)[:300]} |", False
    reasons = "; ".join(f"{count}x {reason}" for reason, count in row["unprunable"].items())
    fits = row["flops apart"] <= 1e-5 and row["difference"] <= row["limit"]
    flops = f"{row['flops apart']:.0e} apart" if row["flops apart"] else "equal"
    precision = "" if row["limit"] == 1e-9 else " (float32)"
    return (
        f"| {name} | {row['size']} | {row['trace']:.2f} | {row['groups']} ({row['not mask-exact']}) "
        f"| {row['free']:.0%} "
        f"| {row['flops']:.3f}, {row['channels']:.3f} | {row['difference']:.0e}{precision} | {flops} | {reasons} |"
    ), fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=names())
    parser.add_argument("--table", type=Path, default=TABLE)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print(HEAD)
    for name in settings.networks:
        rows.append(line(name))
        print(rows[-1][0], flush=True)
    bad = sum(not fits for _, fits in rows)
    summary = f"{len(rows)} networks, {bad} broken or different"
    print(summary)
    settings.table.parent.mkdir(exist_ok=True)
    settings.table.write_text("\n".join(["# Zoo", "", summary + ".", "", HEAD, *(text for text, _ in rows), ""]))


if __name__ == "__main__":
    main()
