"""Candidates per second of the evaluator against a loop that masks and runs: the oracle of VGG-16 at CIFAR size.

Each filter is pruned alone and the loss measured. The evaluator measures every `--every`-th filter; the loop takes the
same time for each candidate, so it measures every eighth of those. They take turns in one process; the ratio is the
median of the rounds. Then two ranks against one, see `two_ranks.py`::

    python benchmarks/candidate_evaluator.py [--every 16] [--rounds 3] [--batch-size 32] [--device cuda]
"""

import argparse
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
from lightning_prune.surgery.masks import in_positions_of_pruned

GOAL = 2.5

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vgg16_bn")
    parser.add_argument("--every", type=int, default=16, help="measure every n-th filter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", default=["loop", "ranks"], choices=["loop", "ranks"])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if "loop" in settings.parts:
        against_the_loop(settings)
    if "ranks" in settings.parts and settings.device == "cpu":
        two_ranks.compare(work_of, settings, settings.rounds)


if __name__ == "__main__":
    main()
