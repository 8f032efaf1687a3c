"""Prune and refit in the middle of training: what of an optimizer's memory of the refitted weights is to be kept?

ResNet-20 is trained for some steps, pruned to half the FLOPs with a refit, and trained on with the same optimizer. The
weights that the refit has changed may keep their momentum, or lose it (which is what `lightning_prune.prune` does), or
lose the second moments of Adam too. Accuracy is that on the validation split, on which the choice is made, and on the
test images, after the last step::

    python benchmarks/momentum.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt [--seeds 3] [--table]
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import stored
import torch
from criteria_finetune import Runner, add_usual, assignment, run_or_show
from finetune_rows import example_for, loss_of
from torch import nn
from torch.optim import Optimizer

import lightning_prune as lp

NETWORK = "resnet20"
BEFORE, AFTER, KEEP = 40, 80, 0.5  # steps, and of the FLOPs
MOMENTA, SECOND = ("momentum_buffer", "exp_avg"), "exp_avg_sq"
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}
KEPT, ZERO, ALL_ZERO = "momentum kept", "momentum zero", "both moments zero"


def ways(name: str) -> list[str]:
    return [KEPT, ZERO] if name == "SGD" else [KEPT, ZERO, ALL_ZERO]


def train(runner: Runner, model: nn.Module, optimizer: Optimizer, steps: int, first_epoch: int) -> None:
    model.train()
    for batch in runner.training_batches(steps, first_epoch):
        optimizer.zero_grad()
        loss_of(model, runner.served(batch)).backward()
        optimizer.step()


def prune(runner: Runner, model: nn.Module, optimizer: Optimizer, way: str) -> None:
    """Prune and refit, and do with the optimizer's state what is to be tried."""
    model.eval()
    inputs = [images for images, _ in runner.batches()]
    graph = lp.trace(model, example_for(model))
    plan = lp.plan(graph, lp.criteria.score(graph, "coherent_obs", inputs), KEEP, round_to=1)
    if way == KEPT:
        refitted = copy.deepcopy(model)
        lp.prune(refitted, plan, compensate="refit", batches=inputs)
        lp.prune(model, plan, optimizer)
        model.load_state_dict(refitted.state_dict())
        return
    report = lp.prune(model, plan, optimizer, compensate="refit", batches=inputs)
    if way == ALL_ZERO and report.compensation:
        named = dict(model.named_parameters())
        for changed in report.compensation.errors:
            optimizer.state[named[changed]][SECOND].zero_()


def measured(runner: Runner) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the accuracies of each optimizer and way."""
    start = runner.network()
    for name, make in OPTIMIZERS.items():
        begun = copy.deepcopy(start)
        before = make(begun.parameters())
        train(runner, begun, before, BEFORE, 0)
        for way in ways(name):
            model = copy.deepcopy(begun)
            optimizer = make(model.parameters())
            optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
            prune(runner, model, optimizer, way)
            train(runner, model, optimizer, AFTER, 1000)
            data = runner.data
            found = {"accuracy": data.test_set, "validation": data.val_set}
            yield f"{name}, {way}", {field: runner.accuracy(model, images) for field, images in found.items()}


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for seed in range(settings.seeds):
        keys = [f"{NETWORK} | {name}, {way} | {seed}" for name in OPTIMIZERS for way in ways(name)]
        if all(key in results for key in keys):
            continue
        for row, found in measured(Runner(NETWORK, seed, settings)):
            results[f"{NETWORK} | {row} | {seed}"] = {**found, "made": stored.made_with(settings)}
            stored.save(settings.results, results)
            print(f"{row} | {seed}: {found}", flush=True)


def table(results: dict[str, Any]) -> str:
    lines = ["| optimizer | validation (%) | test (%) |", "|---|---|---|"]
    for rows in stored.by_setting(results).values():
        for row, seeds in rows.items():
            cells = [
                stored.spread([100 * record[field] for record in seeds.values()], 2)
                for field in ("validation", "accuracy")
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--images", type=int, default=512, help="training images that criterion and refit look at")
    parser.add_argument("--seeds", type=int, default=3)
    add_usual(parser, "momentum.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    run_or_show(settings, run, table)


if __name__ == "__main__":
    main()
