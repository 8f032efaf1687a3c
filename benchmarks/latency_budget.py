"""Ask for a speed-up in measured time: is it met, and what is kept compared with a budget of FLOPs?

For each network, batch size and speed-up: a plan with ``metric="latency"`` is made and applied to a copy, and the copy
timed against the original, turn and turn about. Then budgets of FLOPs are tried until one gives a network that is as
fast, and the sums of the magnitude scores that the two plans keep are compared. A plan by time ranks by score for each
millisecond, one by FLOPs by the score itself: how much of the lead comes from that alone tells a third plan, ranked by
score for each FLOP, with as many FLOPs as the second. Last, the network at half the FLOPs is timed. Results are added
to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/latency_budget.py [--networks mobilenet_v2] [--batch 1 8] [--threads 1] [--table]
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import stored
import torch
import torchvision
from timing import speed_ups
from torch import nn

import lightning_prune as lp
from lightning_prune.planning.by_time import by_score_per_cost, kept_score
from lightning_prune.planning.cost import CostModel
from lightning_prune.planning.limits import Limits
from lightning_prune.pruning_plan import PruningPlan

NETWORKS = ["mobilenet_v2", "resnet18", "resnet50", "vgg16_bn"]
SPEED_UPS = (1.5, 2.0, 3.0)
RANKING = "kept score by ranking alone"
CLOSE, MORE, HALF_FLOPS = 0.95, 1.10, 1.25  # the goals: of the speed-up, of the score, MobileNetV2 at half the FLOPs


def speed_ups_by(plan: PruningPlan, model: nn.Module, x: torch.Tensor, rounds: int = 5) -> list[float]:
    """Time a pruned copy against the model, once a round."""
    pruned = copy.deepcopy(model)
    lp.prune(pruned, plan)
    return speed_ups(model, pruned, x, rounds, runs=7, warm_up=2)


def as_fast_by_flops(
    graph: lp.graph.ChannelGraph, scores: dict[str, torch.Tensor], x: torch.Tensor, wanted: float
) -> tuple[PruningPlan, float]:
    """Find the largest budget of FLOPs that gives a network as fast, by halving."""
    low, high = 0.02, 1.0
    best: tuple[PruningPlan, float] | None = None
    for _ in range(6):
        keep = (low + high) / 2
        plan = lp.plan(graph, scores, keep=keep, metric="flops", round_to=8)
        reached = statistics.median(speed_ups_by(plan, graph.model, x, rounds=3))
        if reached >= wanted:
            low, best = keep, (plan, reached)
        else:
            high = keep
    if best is None:
        raise ValueError(f"No network with {low} of the FLOPs or more is as fast, of those that were tried.")
    return best


def lead_of_ranking(graph: lp.graph.ChannelGraph, scores: dict[str, torch.Tensor], keep: float) -> float:
    """Return the score that a plan by score for each FLOP keeps, compared with one by score, at equal FLOPs."""
    cost, limits = CostModel(graph, "flops"), Limits(graph, scores, round_to=8, min_channels=1)
    ranked = by_score_per_cost(graph, scores, keep, cost, limits)
    return kept_score(ranked, scores) / kept_score(lp.plan(graph, scores, keep=keep, round_to=8), scores)


def traced(name: str, batch: int) -> tuple[lp.graph.ChannelGraph, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(batch, 3, 224, 224)
    return lp.trace(model, x), x


def measure(name: str, batch: int, wanted: float) -> dict[str, Any]:
    graph, x = traced(name, batch)
    scores = lp.criteria.magnitude(graph)
    plan = lp.plan(graph, scores, keep=1 / wanted, metric="latency", round_to=8)
    reached = statistics.median(speed_ups_by(plan, graph.model, x))
    other, other_reached = as_fast_by_flops(graph, scores, x, reached)
    return {
        "asked": wanted,
        "reached": reached,
        "told": 1 / plan.budget["achieved"],
        "kept score": kept_score(plan, scores) / kept_score(other, scores),
        "other speed-up": other_reached,
        "other keep": other.budget["achieved"],
        RANKING: lead_of_ranking(graph, scores, other.budget["achieved"]),
    }


def half_flops(name: str, batch: int) -> dict[str, Any]:
    graph, x = traced(name, batch)
    plan = lp.plan(graph, lp.criteria.magnitude(graph), keep=0.5, round_to=8)
    rounds = speed_ups_by(plan, graph.model, x)
    return {"reached": statistics.median(rounds), "rounds": rounds}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"goals: speed-up at least {CLOSE} of what was asked; {MORE} times the score of a FLOPs plan as fast",
        "",
        "| network | batch | asked | measured | score kept, against a FLOPs plan as fast (its speed-up, FLOPs kept) | "
        "by ranking alone |",
        "|---|---|---|---|---|---|",
    ]
    halves = []
    for key, row in results.items():
        name, batch, _ = key.split(" | ")
        if "asked" not in row:
            halves.append(f"{name}, batch {batch}, half the FLOPs: {row['reached']:.2f}x")
            continue
        met = "" if row["reached"] >= CLOSE * row["asked"] else " (short)"
        lines.append(
            f"| {name} | {batch} | {row['asked']:.1f}x | {row['reached']:.2f}x{met} | {row['kept score']:.2f} "
            f"({row['other speed-up']:.2f}x, {row['other keep']:.2f}) | {row[RANKING]:.2f} |"
        )
    return "\n".join([*lines, "", *halves])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "latency_budget.json")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    results, made = stored.load(settings.results), stored.made_with(settings)
    rows = [
        (name, batch, goal) for batch in settings.batch for name in settings.networks for goal in (*SPEED_UPS, None)
    ]
    for name, batch, goal in [] if settings.table else rows:
        key = f"{name} | {batch} | {goal or 'half'}"
        record = results.setdefault(key, {})
        stored.sign(record, made)
        if "reached" not in record:
            record.update(measure(name, batch, goal) if goal else half_flops(name, batch))
            print(key, record, flush=True)
            stored.save(settings.results, results)
    print(table(results))


if __name__ == "__main__":
    main()
