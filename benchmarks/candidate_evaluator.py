"""Candidates per second of the evaluator against loops that do the same one by one.

First against one that masks and runs: the oracle of VGG-16 at CIFAR size.

Each filter is pruned alone and the loss measured. The evaluator measures every `--every`-th filter; the loop takes the
same time for each candidate, so it measures every eighth of those. They take turns in one process; the ratio is the
median of the rounds. Then two ranks against one, see `two_ranks.py`. Last compensated candidates: random widths of
ResNet-20 at half the FLOPs, folded on 128 images and measured on 500, against a loop that prunes a copy, compensates it
and runs it; by time, and by processor time, which tells more on a machine that has other things to do. Two ranks of
that::

    python benchmarks/candidate_evaluator.py [--every 16] [--rounds 3] [--batch-size 32] [--device cuda]
    python benchmarks/candidate_evaluator.py --parts compensated compensated-ranks [--compensate fold] [--candidates 20]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import two_ranks
from torch import Tensor
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.candidates import evaluate_candidates
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.substitution import named_tensors
from lightning_prune.models import build_network
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search import make_agent
from lightning_prune.search.episodes import play
from lightning_prune.search.pruning_problem import OBSERVATION_SIZE, PruningProblem
from lightning_prune.surgery.masks import in_positions_of_pruned

GOAL = 2.5
COMPENSATED_GOAL = 3.0  # times the loop, and candidates per second
FOLDED_ON, MEASURED_ON, IN_A_BATCH = 128, 500, 125  # images

PARTS = ("loop", "ranks", "compensated", "compensated-ranks")

Batch = tuple[Tensor, Tensor]


def make(settings: argparse.Namespace) -> tuple[ChannelGraph, list[dict[str, Tensor]], list[Batch]]:
    """Return the network, the plans that prune single filters, and one batch."""
    torch.manual_seed(0)
    model = build_network(settings.network).to(settings.device).eval()
    graph = lp.trace(model, torch.zeros(1, 3, 32, 32, device=settings.device))
    filters = [(name, channel) for name, group in graph.groups.items() for channel in range(group.size)]
    candidates = []
    for name, channel in filters[:: settings.every]:
        channels = torch.arange(graph.groups[name].size)
        candidates.append({name: channels[channels != channel]})
    count = settings.batch_size
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    return graph, candidates, [(images.to(settings.device), labels.to(settings.device))]


@torch.no_grad()
def mask_and_run(graph: ChannelGraph, candidates: list[dict[str, Tensor]], batches: list[Batch]) -> list[float]:
    """Return the loss of each candidate, in the way everybody would write it."""
    tensors, losses = named_tensors(graph.model), []
    for candidate in candidates:
        with zeros(graph, candidate, tensors):
            losses.append(sum(F.cross_entropy(graph.model(x), y).item() for x, y in batches) / len(batches))
    return losses


@contextmanager
def zeros(graph: ChannelGraph, candidate: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero what is consumed of pruned channels, and give it back."""
    places = list(in_positions_of_pruned(graph, graph.plan(candidate)))
    before = [tensors[name].index_select(axis, positions.to(tensors[name].device)) for name, axis, positions in places]
    for name, axis, positions in places:
        tensors[name].index_fill_(axis, positions.to(tensors[name].device), 0)
    yield
    for (name, axis, positions), values in zip(places, before, strict=True):
        tensors[name].index_copy_(axis, positions.to(tensors[name].device), values)


def against_the_loop(settings: argparse.Namespace) -> None:
    graph, candidates, batches = make(settings)
    mask_and_run(graph, candidates[:2], batches)  # warms up
    rates: dict[str, list[float]] = {"mask and run": [], "evaluator": []}
    worst = 0.0
    for _ in range(settings.rounds):
        start = time.perf_counter()
        expected = mask_and_run(graph, candidates[::8], batches)
        middle = time.perf_counter()
        measured = evaluate_candidates(graph, candidates, batches)
        rates["mask and run"].append(len(expected) / (middle - start))
        rates["evaluator"].append(len(candidates) / (time.perf_counter() - middle))
        worst = max(worst, float((measured.loss[::8] - torch.tensor(expected)).abs().max()))
    ratio = statistics.median(two / one for one, two in zip(*rates.values(), strict=True))
    print(f"{settings.network}, {len(candidates)} candidates, {settings.batch_size} images, {settings.device}")
    print("| way | candidates per second |\n|---|---|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.2f} |")
    verdict = "met" if ratio >= GOAL else "MISSED"
    print(f"ratio {ratio:.2f} (goal {GOAL}: {verdict}), greatest difference of a loss {worst:.1e}\n", flush=True)


def work_of(settings: argparse.Namespace) -> two_ranks.Work:
    """Return what two ranks share."""
    return partial(evaluate_candidates, *make(settings))


def make_compensated(settings: argparse.Namespace) -> tuple[ChannelGraph, list[PruningPlan], list[Batch], list[Batch]]:
    """Return ResNet-20, plans of random widths, the batches to measure on and those to compensate on."""
    torch.manual_seed(0)
    model = build_network("resnet20").to(settings.device)
    images = torch.randn(FOLDED_ON + MEASURED_ON, 3, 32, 32, device=settings.device)
    model(images)  # so that the statistics are some
    graph = lp.trace(model.eval(), images[:1])
    problem = PruningProblem(graph, keep=0.5)
    agent = make_agent("random", OBSERVATION_SIZE, 1, 0)
    widths, _ = play(problem, agent, settings.candidates)
    labels = torch.randint(10, (len(images),), device=settings.device)
    seen = images[:FOLDED_ON], labels[:FOLDED_ON]
    batches = zip(images[FOLDED_ON:].split(IN_A_BATCH), labels[FOLDED_ON:].split(IN_A_BATCH), strict=True)
    return graph, [problem.plan(row) for row in widths], list(batches), [seen]


@torch.no_grad()
def prune_and_run(
    graph: ChannelGraph, plans: list[PruningPlan], batches: list[Batch], method: str, seen: list[Batch]
) -> list[float]:
    """Return the loss of each candidate, in the way everybody would write it."""
    losses = []
    for plan in plans:
        pruned = copy.deepcopy(graph.model)
        lp.prune(pruned, plan, compensate=method, batches=[images for images, _ in seen])
        losses.append(sum(F.cross_entropy(pruned(x), y).item() for x, y in batches) / len(batches))
    return losses


def compensated_against_the_loop(settings: argparse.Namespace) -> None:
    graph, plans, batches, seen = make_compensated(settings)
    method, some = settings.compensate, plans[: max(2, len(plans) // 5)]
    clocks = {"time": time.perf_counter, "processor time": time.process_time}
    rates: dict[str, dict[str, list[float]]] = {name: {"prune and run": [], "evaluator": []} for name in clocks}
    worst = 0.0
    for _ in range(settings.rounds):
        start = {name: clock() for name, clock in clocks.items()}
        expected = prune_and_run(graph, some, batches, method, seen)
        middle = {name: clock() for name, clock in clocks.items()}
        measured = evaluate_candidates(graph, plans, batches, compensate=method, compensate_batches=seen)
        for name, clock in clocks.items():
            rates[name]["prune and run"].append(len(some) / (middle[name] - start[name]))
            rates[name]["evaluator"].append(len(plans) / (clock() - middle[name]))
        worst = max(worst, float((measured.loss[: len(some)] - torch.tensor(expected)).abs().max()))
    print(f"ResNet-20, {len(plans)} candidates compensated by {method}, {MEASURED_ON} images, {settings.device}")
    print("| way | candidates per second | by processor time |\n|---|---|---|")
    for way in ("prune and run", "evaluator"):
        print(f"| {way} | " + " | ".join(f"{statistics.median(found[way]):.2f}" for found in rates.values()) + " |")
    for name, found in rates.items():
        ratio = statistics.median(two / one for one, two in zip(*found.values(), strict=True))
        verdict = "met" if ratio >= COMPENSATED_GOAL else "MISSED"
        print(f"ratio by {name} {ratio:.2f} (goal {COMPENSATED_GOAL}: {verdict})")
    print(f"goal of {COMPENSATED_GOAL} candidates per second; greatest difference of a loss {worst:.1e}\n", flush=True)


def compensated_work_of(settings: argparse.Namespace) -> two_ranks.Work:
    """Return what two ranks share."""
    graph, plans, batches, seen = make_compensated(settings)
    return partial(evaluate_candidates, graph, plans, batches, compensate=settings.compensate, compensate_batches=seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vgg16_bn")
    parser.add_argument("--every", type=int, default=16, help="measure every n-th filter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--compensate", default="fold", choices=["statistics", "fold", "refit"])
    parser.add_argument("--candidates", type=int, default=20, help="that are compensated")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if "loop" in settings.parts:
        against_the_loop(settings)
    if "ranks" in settings.parts and settings.device == "cpu":
        two_ranks.compare(work_of, settings, settings.rounds)
    if "compensated" in settings.parts:
        compensated_against_the_loop(settings)
    if "compensated-ranks" in settings.parts and settings.device == "cpu":
        two_ranks.compare(compensated_work_of, settings, settings.rounds)


if __name__ == "__main__":
    main()
