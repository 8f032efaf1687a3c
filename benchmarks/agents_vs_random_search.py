"""Agents that choose the widths of a trained ResNet-20 against random search, with the same number of evaluations.

The weights are fixed; half of the FLOPs may stay. Each episode chooses the widths of all groups and earns the accuracy
on a part of the training images, all of which published weights may have seen, once the network has been
compensated (``--compensate``; figures that were recorded before this setting had the statistics of batch normalisation
estimated anew). For each agent and seed: the mean reward of the last fifth of the episodes, and
the best that was found. Then, for each agent, the means over the seeds with 95 % confidence intervals (t-distribution),
and those of the differences from random search, seed by seed. Each run is written to a file when it is done, and not
computed again::

    python benchmarks/agents_vs_random_search.py --root data/cifar10-jpeg --weights resnet20.pt [--episodes 300]
    python benchmarks/agents_vs_random_search.py --root data/cifar10-jpeg --weights resnet20.pt --rates
    python benchmarks/agents_vs_random_search.py --root data/cifar10-jpeg --weights resnet20.pt --two-ranks

The second form compares episodes per second with a loop that prunes a copy, compensates it and runs it, on the same
images; both take turns in one process, and the ratio is the median of the rounds. The third compares two ranks with
one, see `two_ranks.py`.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import stored
import torch
import two_ranks
from scipy import stats
from torch import Tensor

import lightning_prune as lp
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.models import build_network
from lightning_prune.models.weights import load_weights
from lightning_prune.search import make_agent
from lightning_prune.search.episodes import play
from lightning_prune.search.policy_search import PolicySearch
from lightning_prune.search.pruning_problem import OBSERVATION_SIZE, Measure, PruningProblem, accuracy_of

RESULTS = Path(__file__).parent / "results" / "agents_vs_random_search.json"
AGENTS = ("sac", "ppo-clip", "ppo-kl", "ppo-cim", "reinforce", "random")
SETTINGS = ("keep", "episodes", "round", "updates", "images", "recalibrate", "compensate")  # that rewards depend on
LAST = 0.2  # share of the episodes that the mean is taken of
GOAL = 3.0  # episodes per second, as multiple of the loop's
Batch = tuple[Tensor, Tensor]


def make_problem(settings: argparse.Namespace) -> tuple[PruningProblem, list[Batch], list[Batch]]:
    """Return what is decided on, the batches that rewards are measured on, and those that statistics come from."""
    data = ImageFolderDataModule(root=settings.root, batch_size=128, val_fraction=0.1, seed=0)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    model = build_network("resnet20")
    load_weights(model, settings.weights)
    model.to(settings.device).eval()
    graph = lp.trace(model, torch.zeros(1, 3, 32, 32, device=settings.device))
    rewarded = some_of(data, data.val_set, settings.images, 125, settings.device)
    statistics_from = some_of(data, data.train_set, 128 * settings.recalibrate, 128, settings.device)
    return PruningProblem(graph, keep=settings.keep), rewarded, statistics_from


def some_of(data: ImageFolderDataModule, part: Any, count: int, batch_size: int, device: str) -> list[Batch]:
    """Return random images of a part of the data, as evaluation sees them, the same ones each time."""
    chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
    batches = (data.on_after_batch_transfer(part.__getitems__(at.tolist())) for at in chosen.split(batch_size))
    return [(images.to(device), labels.to(device)) for images, labels in batches]


def run(agent: str, seed: int, problem: PruningProblem, measure: Measure, settings: argparse.Namespace) -> list[float]:
    """Return the rewards of all episodes of one run."""
    search = PolicySearch(agent, steps=len(problem), episodes=settings.round, seed=seed, agent_updates=settings.updates)
    rewards: list[float] = []
    while len(rewards) < settings.episodes:
        earned = measure([problem.plan(widths) for widths in search.explore(problem)])
        search.learn(earned)
        rewards += earned.tolist()
    return rewards


def interval(values: list[float]) -> str:
    """Return mean and half-width of the 95 % confidence interval, in points."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else float("nan")
    return f"{100 * float(np.mean(values)):6.2f} ± {100 * half:4.2f}"


def last_part(rewards: list[float]) -> float:
    return statistics.fmean(rewards[-max(1, round(LAST * len(rewards))) :])


def table(found: dict[str, list[float]], settings: argparse.Namespace) -> None:
    """Print what is known of each agent."""
    print(f"{'agent':10} {'last 20 %':>14} {'best':>14} {'last - random':>16} {'best - random':>16}  seeds")
    for agent in settings.agents:
        seeds = [s for s in range(settings.seeds) if key(agent, s) in found and key("random", s) in found]
        if not seeds:
            continue
        cells = []
        for figure in (last_part, max):
            own = [figure(found[key(agent, seed)]) for seed in seeds]
            other = [figure(found[key("random", seed)]) for seed in seeds]
            cells.append((interval(own), interval([a - b for a, b in zip(own, other, strict=True)])))
        (last, last_gain), (best, best_gain) = cells
        print(f"{agent:10} {last:>14} {best:>14} {last_gain:>16} {best_gain:>16}  {len(seeds)}")


def key(agent: str, seed: int) -> str:
    return f"{agent}/{seed}"


def compare(settings: argparse.Namespace) -> None:
    """Run what has not been run yet, and print the table."""
    about = {name: getattr(settings, name) for name in SETTINGS}
    begun = {"settings": {**about, "weights": Path(settings.weights).name}, "rewards": {}}
    results = stored.load(settings.results) or begun
    stored.check_settings(results["settings"], about)
    found: dict[str, list[float]] = results["rewards"]
    made = results.setdefault("made", {})  # by run; earlier runs did not say
    problem, rewarded, statistics_from = make_problem(settings)
    measure = accuracy_of(problem.graph, rewarded, **compensated(settings, statistics_from))
    for seed in range(settings.seeds):
        for agent in settings.agents:
            if key(agent, seed) in found:
                continue
            start = time.perf_counter()
            found[key(agent, seed)] = rewards = run(agent, seed, problem, measure, settings)
            made[key(agent, seed)] = stored.made_with(argparse.Namespace(**about), settings.device)
            stored.save(settings.results, results)
            print(
                f"{agent:10} seed {seed}: last {last_part(rewards):.4f}, best {max(rewards):.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    table(found, settings)


def compensated(settings: argparse.Namespace, batches: list[Batch]) -> dict[str, Any]:
    """Return how candidates are compensated, as `evaluate_candidates` is told."""
    return {"compensate": settings.compensate, "compensate_batches": batches}


@torch.no_grad()
def prune_and_run(
    problem: PruningProblem, plans: list[Any], rewarded: list[Batch], method: str, batches: list[Batch]
) -> list[float]:
    """Return the rewards of plans, in the way everybody would write it."""
    rewards = []
    for plan in plans:
        pruned = copy.deepcopy(problem.graph.model)
        lp.prune(pruned, plan, compensate=method, batches=[images for images, _ in batches])
        hits = sum(int((pruned(images).argmax(1) == labels).sum()) for images, labels in rewarded)
        rewards.append(hits / sum(len(labels) for _, labels in rewarded))
    return rewards


def rates(settings: argparse.Namespace) -> None:
    """Compare episodes per second."""
    problem, rewarded, batches = make_problem(settings)
    agent = make_agent("random", OBSERVATION_SIZE, 1, 0)
    measure = accuracy_of(problem.graph, rewarded, **compensated(settings, batches))
    ratios, worst = [], 0.0
    for _ in range(settings.rounds + 1):  # the first one warms up
        start = time.perf_counter()
        plans = [problem.plan(widths) for widths in play(problem, agent, settings.round)[0]]
        playing = time.perf_counter() - start
        ours = measure(plans).tolist()
        middle = time.perf_counter()
        naive = prune_and_run(problem, plans, rewarded, settings.compensate, batches)
        end = time.perf_counter()
        ratios.append((end - middle + playing) / (middle - start))
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, naive, strict=True)))
    print(f"{settings.round / (middle - start):.2f} episodes/s; {statistics.median(ratios[1:]):.2f} x prune and run ")
    print(f"(goal {GOAL} x); greatest difference of rewards {worst:.1e}")


def work_of(settings: argparse.Namespace) -> two_ranks.Work:
    """Return what two ranks share: some rounds of episodes, of which each rank plays all and measures its share."""
    problem, rewarded, batches = make_problem(settings)
    measure = accuracy_of(problem.graph, rewarded, **compensated(settings, batches))

    def work() -> None:
        agent = make_agent("random", OBSERVATION_SIZE, 1, 0)
        for _ in range(4):
            measure([problem.plan(widths) for widths in play(problem, agent, settings.round)[0]])

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with train/ and test/ of CIFAR-10")
    parser.add_argument("--weights", required=True, help="weights of a trained ResNet-20")
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=AGENTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--round", type=int, default=10, help="episodes between updates")
    parser.add_argument("--updates", type=int, default=200, help="updates of the agent in each round")
    parser.add_argument("--images", type=int, default=1000, help="that rewards are measured on")
    parser.add_argument("--recalibrate", type=int, default=4, help="batches of 128 images that statistics come from")
    parser.add_argument("--compensate", default="statistics", choices=["none", "statistics", "fold", "refit"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rates", action="store_true", help="compare episodes per second instead")
    parser.add_argument("--two-ranks", action="store_true", help="compare two ranks with one instead")
    parser.add_argument("--rounds", type=int, default=5, help="of that comparison")
    settings = parser.parse_args()
    if settings.two_ranks:
        two_ranks.compare(work_of, settings, settings.rounds)
    else:
        (rates if settings.rates else compare)(settings)


if __name__ == "__main__":
    main()
