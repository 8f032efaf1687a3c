"""Prune trained networks and compensate without a step of training: what accuracy is left right after the prune?

The networks are those that `criteria_finetune.py` starts from. Six criteria of its rows plan, from the same training
images, and each plan is applied plainly, with the statistics of batch normalisation following, folded, and refitted.
Two forms of Torch-Pruning stand beside them, plainly and with these statistics estimated anew.
Nothing is chosen by the test images: what was chosen was chosen on the validation split, whose accuracy is kept too
(the published weights that the residual networks start from have seen its images). Seconds are those of one core, for
the plan and for the prune with its compensation.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/compensation.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt resnet56=resnet56.pt
        [--networks resnet20] [--keep 0.7 0.5 0.3] [--rows L1 LAMP] [--seeds 3] [--table]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import stored
import torch
from criteria_finetune import HALF, NETWORKS, Runner, add_usual, assignment, run_or_show
from finetune_rows import ROWS, Batches, Recalibrated, example_for
from torch import nn

import lightning_prune as lp
from lightning_prune.pruning_plan import PruningPlan

WHOLE = "not pruned"
CRITERIA = ["uniform, L1", "L1", "LAMP", "group magnitude", "Taylor A", "coherent OBS"]
RIVALS = ["Torch-Pruning, group norm", "Torch-Pruning, group norm, uniform"]
VALIDATED = 5  # of so many images of the validation split one is looked at
METHODS = ["none", "statistics", "fold", "refit"]
OF_RIVALS = METHODS[:2]
IMAGES = 1024  # training images that are looked at
MORE_IMAGES = {"resnet20": 2048}  # where the validation split tells them apart, and a minute of a core allows for them


def whole(runner: Runner, model: nn.Module, settings: argparse.Namespace) -> dict[str, Any]:
    return {**accuracies(runner, model, settings), "flops": 1.0, "seconds": {}}


def planned(row: str, model: nn.Module, batches: Batches, keep: float) -> tuple[PruningPlan, float]:
    """Return the plan of a row, and the seconds of a core that it took."""
    began = time.process_time()
    graph = lp.trace(model, example_for(model))
    plan = ROWS[row].planned(graph, batches, keep)
    return plan, time.process_time() - began


def compensated(
    runner: Runner, model: nn.Module, plan: PruningPlan, method: str, batches: Batches, settings: argparse.Namespace
) -> dict[str, Any]:
    """Prune a copy by a plan, and return what it is worth."""
    pruned = copy.deepcopy(model)
    inputs = [images for images, _ in batches]  # labels are not needed
    began = time.process_time()
    lp.prune(pruned, plan, compensate=method, batches=inputs)
    seconds = time.process_time() - began
    found = accuracies(runner, pruned, settings)
    return {**found, "flops": plan.budget["achieved"], "widths": plan.widths, "seconds": {"prune": seconds}}


def by_rival(
    runner: Runner, model: nn.Module, row: str, keep: float, method: str, batches: Batches, settings: argparse.Namespace
) -> dict[str, Any]:
    """Let Torch-Pruning prune a copy, and return what it is worth."""
    pruned = copy.deepcopy(model)
    began = time.process_time()
    rival = Recalibrated(ROWS[row]) if method == "statistics" else ROWS[row]
    found = rival.begin(pruned, batches)(keep, [])
    seconds = time.process_time() - began
    return {**accuracies(runner, pruned, settings), **found, "seconds": {"prune": seconds}}


def accuracies(runner: Runner, model: nn.Module, settings: argparse.Namespace) -> dict[str, float]:
    return {
        "accuracy": runner.accuracy(model, runner.data.test_set, settings.every),
        "validation": runner.accuracy(model, runner.data.val_set, VALIDATED * settings.every),
    }


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for seed in range(settings.seeds):
        for network in settings.networks:
            settings.images = MORE_IMAGES.get(network, IMAGES)
            keys = wanted(network, seed, settings)
            for key, (_, _, keep) in keys.items():
                stored.check(results.get(key, {}), stored.made_with(settings, keep=keep))
            if all(key in results for key in keys):
                continue
            runner = Runner(network, seed, settings)
            model = runner.network().eval()
            batches = runner.batches()
            plans: dict[tuple[str, float], tuple[PruningPlan, float]] = {}
            for key, (row, method, keep) in keys.items():
                if key in results:
                    continue
                if row == WHOLE:
                    record = whole(runner, model, settings)
                elif row in RIVALS:
                    record = by_rival(runner, model, row, keep, method, batches, settings)
                else:
                    if (row, keep) not in plans:
                        plans[row, keep] = planned(row, model, batches, keep)
                    plan, seconds = plans[row, keep]
                    record = compensated(runner, model, plan, method, batches, settings)
                    record["seconds"]["plan"] = seconds
                results[key] = {**record, "made": stored.made_with(settings, keep=keep)}
                stored.save(settings.results, results)
                print(f"{key}: {record['accuracy']:.4f}; seconds {record['seconds']}", flush=True)


def wanted(network: str, seed: int, settings: argparse.Namespace) -> dict[str, tuple[str, str, float]]:
    """Return row, method and fraction of the FLOPs of each record, by its key."""
    found = {f"{network} | {WHOLE} | {seed}": (WHOLE, "none", 1.0)}
    for keep in settings.keep:
        setting = network if keep == HALF else f"{network}, keep {keep}"
        for row in settings.rows:
            methods = [method for method in settings.methods if row not in RIVALS or method in OF_RIVALS]
            for method in methods:
                found[f"{setting} | {row}, {method} | {seed}"] = (row, method, keep)
    return found


def table(results: dict[str, Any]) -> str:
    """Return a table for each network and budget: criteria by methods."""
    lines = []
    for setting, found in stored.by_setting(results).items():
        lines += [f"\n{setting}, CIFAR-10 (JPEG copy), test accuracy right after the prune (%):\n"]
        if WHOLE in found:
            lines.append(f"not pruned: {percent(list(found[WHOLE].values()))}\n")
        lines += [f"| criterion | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
        for row in [*CRITERIA, *RIVALS]:
            cells = [percent(list(found.get(f"{row}, {method}", {}).values())) for method in METHODS]
            if any(cells):
                lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(records: Sequence[dict[str, Any]]) -> str:
    return stored.spread([100 * record["accuracy"] for record in records], 1) if records else ""


def most_seconds(results: dict[str, Any]) -> str:
    """Return what compensation costs, by setting and method: the median of the seconds of a core."""
    lines = []
    for setting, found in stored.by_setting(results).items():
        for method in METHODS:
            records = [
                record for row, seeds in found.items() if row.endswith(f", {method}") for record in seeds.values()
            ]
            if records:
                seconds = statistics.median(record["seconds"]["prune"] for record in records)
                lines.append(f"{setting}, {method}: {seconds:.1f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn/4", "resnet56"], choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=[HALF], help="of the FLOPs")
    parser.add_argument("--rows", nargs="+", default=[*CRITERIA, *RIVALS], choices=list(ROWS), metavar="ROW")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="of how many images one is tested")
    add_usual(parser, "compensation.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    results = run_or_show(settings, run, table)
    print(most_seconds(results))


if __name__ == "__main__":
    main()
