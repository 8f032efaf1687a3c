"""Agents against all controls, with as many evaluations each: what is the best plan worth once it has been fine-tuned?

Every search chooses the widths of a trained network within half of the FLOPs; which channels of a group stay is up to
the default criterion for all of them. An evaluation is the accuracy on training images that nothing was fitted to, of
the network as it is once it has been compensated on others. The plan that earned most is then refitted and fine-tuned
as in `criteria_finetune.py`, all with the same order of the data, and measured on the test images, by which nothing is
chosen. The default allocation, which takes no evaluation, is a row of its own. SAC and PPO of Stable-Baselines3 train
on `PruningEnv` with settings of their own, but that PPO learns after each round: its 2,048 steps are more than there
are. The table gives the best reward and the accuracy, each with its lead over random search seed by seed and the 95 %
interval (t-distribution), and what was tried; under it, what could be won at most over the default allocation. It is
also written to a page beside the results::

    python benchmarks/agents_after_finetuning.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt
        [--networks "resnet20, published"] [--evaluations 100 300] [--rows ppo-cim evolution] [--seeds 5] [--table]
"""

import argparse
import copy
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import stored
import torch
from criteria_finetune import NETWORKS, Runner, add_usual, assignment, run_or_show
from finetune_rows import by_score, example_for, loss_of
from scipy import stats
from torch import nn

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.search import make_search
from lightning_prune.search.pruning_env import PruningEnv
from lightning_prune.search.pruning_problem import PruningProblem, accuracy_of
from lightning_prune.search.width_search import Tried

HALF = 0.5
DEFAULT, RANDOM = "default allocation", "random"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    RANDOM: ("random", {}),
    "uniform": ("uniform", {}),
    "greedy": ("greedy", {}),
    "evolution": ("evolution", {}),
    "halving": ("halving", {}),
    "skip-whole": ("skip-whole", {}),
    "sac": ("sac", {}),
    "ppo-clip": ("ppo-clip", {}),
    "ppo-cim": ("ppo-cim", {}),
    "reinforce": ("reinforce", {}),
    "ppo-cim, around the allocation": ("ppo-cim", {"around": "allocation"}),
    "ppo-cim, around the best": ("ppo-cim", {"around": "best"}),
    "reinforce, around the best": ("reinforce", {"around": "best"}),
    "ppo-cim, against the best": ("ppo-cim", {"against": "best"}),
}
SB3 = {"SAC of SB3": "SAC", "PPO of SB3": "PPO"}


class Study:
    """One network and seed: what all rows have in common."""

    def __init__(self, network: str, evaluations: int, seed: int, settings: argparse.Namespace) -> None:
        self.evaluations, self.seed, self.settings = evaluations, seed, settings
        self.runner = Runner(network, seed, settings)
        self.model = self.runner.network().eval()
        batches = self.runner.batches()
        folded_on = -(-settings.folded_on // 128)
        self.fitted_to, self.seen = batches[:folded_on], batches[folded_on:]
        self.graph = lp.trace(self.model, example_for(self.model))
        self.scores = criteria.score(self.graph, "coherent_obs", self.fitted_to, loss_of)
        self.problem = PruningProblem(self.graph, keep=HALF, scores=self.scores)
        self.measure = accuracy_of(
            self.graph, self.seen, compensate=settings.compensate, compensate_batches=self.fitted_to
        )

    def record(self, row: str) -> dict[str, Any]:
        """Return what one row has found, and what that is worth after fine-tuning."""
        began = time.process_time()
        found = self.found(row)
        searched = time.process_time()
        plan: PruningPlan = found.pop("plan")
        accuracy = self.tuned(plan)
        seconds = {"search": round(searched - began, 1), "fine-tuning": round(time.process_time() - searched, 1)}
        budget = plan.budget or {}
        return {"accuracy": accuracy, "flops": budget["achieved"], "widths": plan.widths, **found, "seconds": seconds}

    def found(self, row: str) -> dict[str, Any]:
        """Return the best plan of a row, and what is known of how it was found."""
        if row == DEFAULT:
            return self.default()
        return self.trained_on(SB3[row]) if row in SB3 else self.searched(row)

    def default(self) -> dict[str, Any]:
        """Return the allocation of the default criterion."""
        plan = by_score("coherent_obs", self.graph, self.fitted_to, HALF)
        return {"plan": plan, "reward": float(self.measure([plan])[0])}

    def searched(self, row: str) -> dict[str, Any]:
        """Return the best plan of a search within the budget."""
        name, own = ROWS[row]
        search = make_search(
            name, steps=len(self.problem), episodes=self.settings.round, evaluations=self.evaluations, seed=self.seed,
            **own,
        )  # fmt: skip
        while len(search.tried) < self.evaluations and not search.finished:
            widths = search.explore(self.problem)
            search.learn(self.measure([self.problem.plan(each) for each in widths]))
        best = search.tried.best()
        plan = self.problem.plan(search.settle(self.problem)[0] if best is None else best[0])
        reward = float(self.measure([plan])[0]) if best is None else best[1]
        return {"plan": plan, "reward": reward, "rewards": search.tried.rewards, "census": asdict(search.census())}

    def trained_on(self, name: str) -> dict[str, Any]:
        """Return the best plan that an agent of Stable-Baselines3 has tried on `PruningEnv`."""
        import stable_baselines3

        tried = Tried()

        def noted(plans: list[PruningPlan]) -> torch.Tensor:
            rewards = self.measure(plans)
            widths = np.array([[plan.widths[group] for group in self.graph.groups] for plan in plans])
            tried.add(widths, rewards, np.ones(len(plans), dtype=bool))
            return rewards

        env = PruningEnv(self.graph, noted, keep=HALF, scores=self.scores)
        round_steps = len(self.problem) * self.settings.round
        own = {"n_steps": round_steps, "batch_size": round_steps} if name == "PPO" else {}
        agent = getattr(stable_baselines3, name)("MlpPolicy", env, seed=self.seed, device="cpu", **own)
        agent.learn(len(self.problem) * self.evaluations)
        widths, reward = tried.best() or ([], 0.0)
        plan = self.problem.plan(np.array(widths))
        return {"plan": plan, "reward": reward, "rewards": tried.rewards, "census": asdict(tried.census())}

    def tuned(self, plan: PruningPlan) -> float:
        """Return the accuracy on the test images after a refit and fine-tuning."""
        pruned: nn.Module = copy.deepcopy(self.model)
        lp.prune(pruned, plan, compensate="refit", batches=[images for images, _ in self.fitted_to])
        steps, lr = NETWORKS[self.runner.name][3]
        self.runner.train(pruned, self.settings.steps or steps, lr, first_epoch=1000)
        return self.runner.accuracy(pruned, self.runner.data.test_set)


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for seed in range(settings.seeds):
        for network in settings.networks:
            for evaluations in settings.evaluations:
                complete(network, evaluations, seed, settings, results)


def complete(network: str, evaluations: int, seed: int, settings: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run the rows of one network and seed that have not been run."""
    keys = {f"{network}, {evaluations} evaluations | {row} | {seed}": row for row in settings.rows}
    if all(key in results for key in keys):
        return
    study = Study(network, evaluations, seed, settings)
    runs = {key: partial(study.record, row) for key, row in keys.items()}
    stored.complete(settings.results, results, runs, stored.made_with(settings, evaluations=evaluations))


def table(results: dict[str, Any]) -> str:
    lines = []
    for setting, rows in stored.by_setting(results).items():
        lines += [
            f"\n{setting}, half of the FLOPs, CIFAR-10 (JPEG copy):\n",
            "| search | seeds | best reward (%) | lead over random | fine-tuned (%) | lead over random | tried |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row, seeds in rows.items():
            cells = [row, str(len(seeds))]
            for figure in ("reward", "accuracy"):
                values = {seed: 100 * record[figure] for seed, record in seeds.items()}
                control = {seed: 100 * record[figure] for seed, record in rows.get(RANDOM, {}).items()}
                leads = [value - control[seed] for seed, value in values.items() if seed in control]
                cells += [interval(list(values.values())), interval(leads)]
            lines.append(f"| {' | '.join([*cells, tried(list(seeds.values()))])} |")
        lines += bound(rows)
    return "\n".join(lines) + "\n"


def bound(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Return how far the best row of each seed is above the default allocation, which bounds what search can win."""
    leads = []
    for seed, default in rows.get(DEFAULT, {}).items():
        found = [seeds[seed]["accuracy"] for seeds in rows.values() if seed in seeds]
        if len(found) == len(rows):
            leads.append(100 * (max(found) - default["accuracy"]))
    if not leads:
        return []
    return [
        f"\nThe best of the {len(rows)} rows, chosen for each seed by these very figures, is {interval(leads)} above "
        "the default allocation: who knew beforehand which of these plans is best would win that, the luck of the draw "
        "included."
    ]


def interval(values: list[float]) -> str:
    """Return mean and half-width of the 95 % confidence interval."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{float(np.mean(values)):.2f} ± {half:.2f}"


def tried(records: list[dict[str, Any]]) -> str:
    """Return what was tried, on average."""
    censuses = [record["census"] for record in records if "census" in record]
    if not censuses:
        return "-"
    counts = [np.mean([census[name] for census in censuses]) for name in ("tried", "distinct", "within_budget")]
    constant = sum(bool(census["constant"]) for census in censuses)
    told = f"{counts[0]:.0f}, {counts[1]:.0f} distinct, {counts[2]:.0f} within the budget"
    return f"{told}, constant in {constant} of {len(censuses)}" if constant else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn/4"], choices=list(NETWORKS))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100, 300])
    parser.add_argument("--rows", nargs="+", default=[DEFAULT, *ROWS, *SB3], choices=[DEFAULT, *ROWS, *SB3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--round", type=int, default=10, help="evaluations between updates")
    parser.add_argument("--rewarded-on", type=int, default=500, help="images")
    parser.add_argument("--folded-on", type=int, default=128, help="images that candidates are compensated on")
    parser.add_argument("--compensate", default="fold", choices=["statistics", "fold", "refit"])
    parser.add_argument("--steps", type=int, help="of fine-tuning; default those of criteria_finetune.py")
    add_usual(parser, "agents_after_finetuning.json")
    settings = parser.parse_args()
    settings.images = settings.folded_on + settings.rewarded_on
    torch.set_num_threads(1)
    results = run_or_show(settings, run, table)
    if results:
        stored.save_page(settings.results, f"# Agents against controls, after fine-tuning\n{table(results)}")


if __name__ == "__main__":
    main()
