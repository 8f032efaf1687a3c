"""Which measure of a network that has just been pruned says best what it is worth once it has been fine-tuned?

Search needs an answer, for its reward is such a measure. Plans at half the FLOPs are drawn, half of them at random and
half around the widths of the default criterion. Each is measured in all ways that are known here, on training images
that nothing was fitted to, and then refitted and fine-tuned as in `criteria_finetune.py`. The table gives
Spearman's correlation of each measure with the accuracy on the test images, over all plans and over the better half of
them (by that accuracy), with the 95 % interval of a bootstrap, and the seconds of a core that the measure takes::

    python benchmarks/reward_correlation.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt
        [--networks resnet20] [--plans 60] [--steps 500] [--table]

With ``--steps`` plans are fine-tuned for so long instead, to see whether that washes the correlation out.
"""

import argparse
import copy
import time
from functools import partial
from typing import Any

import numpy as np
import stored
import torch
from criteria_finetune import NETWORKS, Runner, add_usual, assignment, run_or_show
from finetune_rows import Batches, by_score, example_for
from scipy import stats
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search.episodes import PruningEpisodes
from lightning_prune.search.pruning_problem import PruningProblem

HALF = 0.5
FITTED_TO = 512  # training images that compensation looks at
REWARDED = (250, 500, 1000, 2000)  # other training images that a measure is taken on
METHODS = ("none", "statistics", "fold", "refit")
FEW_STEPS = 10
NEAR = 0.15  # standard deviation of the fractions around those of the default criterion
RESAMPLED = 1000


class Drawn:
    """The plans of one network and seed.

    Args:
        model: The network.
        batches: What scores look at.
        seed: Decides on all that is drawn.
    """

    def __init__(self, model: nn.Module, batches: Batches, seed: int) -> None:
        graph = lp.trace(model, example_for(model))
        self.problem = PruningProblem(graph, keep=HALF, criterion="group_magnitude")
        default = by_score("coherent_obs", graph, batches, HALF)
        widths = [default.widths[name] for name in graph.groups]
        self._default = 1 - torch.tensor(widths) / torch.from_numpy(self.problem.sizes)
        self._seed = seed

    def plan(self, number: int) -> PruningPlan:
        """Return a plan: those of odd numbers are near the default."""
        generator = torch.Generator().manual_seed(1000 * self._seed + number)
        episodes = PruningEpisodes(self.problem, 1)
        while not episodes.ended:
            if number % 2:
                wished = self._default[episodes.position] + NEAR * torch.randn(1, generator=generator)
            else:
                low, high = episodes.view.low, episodes.view.high
                wished = low + (high - low) * torch.rand(1, generator=generator)
            episodes.step(wished.reshape(1, 1))
        return self.problem.plan(episodes.widths[0])


def measured(runner: Runner, model: nn.Module, plan: PruningPlan, fitted_to: Batches, seen: Batches) -> dict[str, Any]:
    """Return what each method leaves, by accuracy and by loss on ever more images, and the seconds it took."""
    inputs = [images for images, _ in fitted_to]
    found = {}
    for method in METHODS:
        pruned = copy.deepcopy(model)
        began = time.process_time()
        lp.prune(pruned, plan, compensate=method, batches=inputs)
        found[method] = {"seconds": time.process_time() - began, **worth(pruned, seen)}
    _, lr = NETWORKS[runner.name][3]
    began = time.process_time()
    runner.train(pruned, FEW_STEPS, lr, first_epoch=2000)
    seconds = found["refit"]["seconds"] + time.process_time() - began
    found[f"refit, {FEW_STEPS} steps"] = {"seconds": seconds, **worth(pruned, seen)}
    return found


@torch.no_grad()
def worth(model: nn.Module, seen: Batches) -> dict[str, float]:
    """Return accuracy and loss on the first images of each number."""
    model.eval()
    outputs = torch.cat([model(images) for images, _ in seen])
    labels = torch.cat([labels for _, labels in seen])
    right = (outputs.argmax(1) == labels).float()
    losses = F.cross_entropy(outputs, labels, reduction="none")
    found = {}
    for count in REWARDED:
        found[f"accuracy, {count} images"] = float(right[:count].mean())
        found[f"loss, {count} images"] = float(losses[:count].mean())
    return found


def tuned(runner: Runner, model: nn.Module, plan: PruningPlan, fitted_to: Batches, steps: int) -> float:
    """Return the accuracy on the test images after a refit and fine-tuning."""
    pruned = copy.deepcopy(model)
    lp.prune(pruned, plan, compensate="refit", batches=[images for images, _ in fitted_to])
    _, lr = NETWORKS[runner.name][3]
    runner.train(pruned, steps, lr, first_epoch=1000)
    return runner.accuracy(pruned, runner.data.test_set)


class Study:
    """The plans of one network, and what each is worth."""

    def __init__(self, network: str, steps: int, settings: argparse.Namespace) -> None:
        self.runner, self.steps = Runner(network, settings.seed, settings), steps
        self.model = self.runner.network().eval()
        batches = self.runner.batches()
        self.fitted_to, self.seen = batches[: FITTED_TO // 128], batches[FITTED_TO // 128 :]
        self.drawn = Drawn(self.model, self.fitted_to, settings.seed)

    def record(self, number: int) -> dict[str, Any]:
        """Return what one plan is worth, before and after fine-tuning."""
        plan = self.drawn.plan(number)
        rewards = measured(self.runner, self.model, plan, self.fitted_to, self.seen)
        accuracy = tuned(self.runner, self.model, plan, self.fitted_to, self.steps)
        return {
            "accuracy": accuracy, "flops": plan.budget["achieved"], "widths": plan.widths, "rewards": rewards,
            "seconds": {},
        }  # fmt: skip


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for network in settings.networks:
        steps = settings.steps or NETWORKS[network][3][0]
        keys = [f"{network}, {steps} steps | plan {number} | {settings.seed}" for number in range(settings.plans)]
        if all(key in results for key in keys):
            continue
        study = Study(network, steps, settings)
        runs = {key: partial(study.record, number) for number, key in enumerate(keys)}
        stored.complete(settings.results, results, runs, stored.made_with(settings, steps=steps))


def table(results: dict[str, Any]) -> str:
    """Return the correlation of each measure with what fine-tuning gives."""
    lines = []
    for setting, plans in stored.by_setting(results).items():
        records = [record for seeds in plans.values() for record in seeds.values()]
        wanted = np.array([record["accuracy"] for record in records])
        better = wanted >= np.median(wanted)
        lines += [f"\n{setting}, {len(records)} plans, {wanted.min():.3f} to {wanted.max():.3f} when fine-tuned:\n"]
        lines += ["| measure | seconds | all plans | the better half |", "|---|---|---|---|"]
        for method, example in records[0]["rewards"].items():
            seconds = np.median([record["rewards"][method]["seconds"] for record in records])
            for name in example:
                if name == "seconds":
                    continue
                sign = -1 if name.startswith("loss") else 1
                rewards = sign * np.array([record["rewards"][method][name] for record in records])
                cells = [correlation(rewards, wanted), correlation(rewards[better], wanted[better])]
                lines.append(f"| {method}, {name} | {seconds:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlation(rewards: np.ndarray, wanted: np.ndarray) -> str:
    """Return Spearman's correlation with the 95 % interval of a bootstrap over the plans."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(wanted), size=(RESAMPLED, len(wanted)))
    found = [stats.spearmanr(rewards[some], wanted[some]).statistic for some in drawn]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return f"{stats.spearmanr(rewards, wanted).statistic:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--networks", nargs="+", default=["vgg11_bn/4", "resnet20"], choices=list(NETWORKS))
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--steps", type=int, help="of fine-tuning; default those of criteria_finetune.py")
    parser.add_argument("--seed", type=int, default=0)
    add_usual(parser, "reward_correlation.json")
    settings = parser.parse_args()
    settings.images = FITTED_TO + max(REWARDED)
    torch.set_num_threads(1)
    run_or_show(settings, run, table)


if __name__ == "__main__":
    main()
