"""The filters that agents of single layers choose, against those of least L1 norm and random ones at the same widths.

The layers of a trained network are pruned one after the other, with some steps of training after each, until half of
the FLOPs have left; then training goes on. First `LearnToPruneCallback` does so. The other rows then prune each layer
at the same step and to the same width, by another choice of its filters. All rows of a seed start from the same trained
network, and have images in the same order with the same augmentation, steps and learning rate. Accuracy is that on the
test images after the last step; nothing is chosen by it. A network that is trained on just as long without being pruned
is the baseline. Seconds are of processor time.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/learn_to_prune.py --root data/cifar10-jpeg [--network vgg16_bn] [--seeds 3] [--table]
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import stored
from torch import Tensor
from training import outcome, quiet_trainer
from typing_extensions import override

from lightning_prune import criteria
from lightning_prune.callbacks import LearnToPruneCallback
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.models import ImageClassifier, Optimization
from lightning_prune.search.filter_agent import FilterSearch

# Network, its settings, and its number of layers that are pruned.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vgg11_bn/4": ("vgg11_bn", {"width": 0.25}, 8),
    "vgg16_bn": ("vgg16_bn", {}, 13),
}
ROWS = AGENTS, L1, _, WHOLE = "agents", "L1, same widths", "random channels, same widths", "not pruned"
TRAINING_LR, LR = 0.05, 0.01
Settings = argparse.Namespace


class Chosen(LearnToPruneCallback):
    """Prune the same layers at the same time to given widths, by a criterion.

    Args:
        criterion: The criterion.
        widths: Channels that stay of each layer.
        settings: As for `LearnToPruneCallback`.
    """

    def __init__(self, criterion: str | dict[str, Any], widths: dict[str, int], **settings: Any) -> None:
        super().__init__(**settings)
        self.criterion, self.widths = criterion, widths

    @override
    def decide(self, search: FilterSearch, name: str, kept: dict[str, Tensor]) -> Tensor:
        scores = criteria.score(self.run.graph, self.criterion)[name]
        return scores.topk(self.widths[name]).indices.sort().values


def make_callback(row: str, seed: int, settings: Settings, widths: dict[str, int]) -> LearnToPruneCallback | None:
    """Make what prunes one layer before each epoch, from the first on."""
    common: dict[str, Any] = {
        "keep": settings.keep, "round_to": 1, "start_epoch": 0, "steps": NETWORKS[settings.network][2],
        "accepted_drop": settings.accepted_drop,
        "samples": settings.samples, "updates": settings.updates, "limit_batches": settings.batches,
        "candidate_batches": settings.recalibrate, "seed": seed,
    }  # fmt: skip
    if row == WHOLE:
        return None
    if row == AGENTS:
        return LearnToPruneCallback(**common)
    return Chosen("l1" if row == L1 else {"name": "random", "seed": seed}, widths, **common)


def run(row: str, seed: int, settings: Settings, results: dict[str, Any]) -> dict[str, Any]:
    """Prune the trained network by one row, and train it on."""
    module, data = make_module(seed, settings, Optimization(LR)), make_data(seed, settings)
    module.network.load_state_dict(trained(seed, settings))
    callback = make_callback(row, seed, settings, results.get(key(AGENTS, seed, settings), {}).get("widths", {}))
    trainer = make_trainer(settings, settings.epochs, settings.steps, *([] if callback is None else [callback]))
    began = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - began
    return {**outcome(trainer, module, data), "seconds": seconds}


def trained(seed: int, settings: Settings) -> dict[str, Tensor]:
    """Return the weights of the trained network, made now or before."""

    def train() -> dict[str, Tensor]:
        module = make_module(seed, settings, Optimization(TRAINING_LR))
        make_trainer(settings, settings.training_epochs, 1.0).fit(module, datamodule=make_data(seed, settings))
        return module.network.state_dict()

    file = f"{settings.network.replace('/', '-')}-{seed}-{settings.training_epochs}.pt"
    return stored.kept(settings.work / file, train)


def make_module(seed: int, settings: Settings, optimization: Optimization) -> ImageClassifier:
    L.seed_everything(seed, verbose=False)
    network, arguments, _ = NETWORKS[settings.network]
    return ImageClassifier(network, network_args=arguments, optimization=optimization)


def make_data(seed: int, settings: Settings) -> ImageFolderDataModule:
    return ImageFolderDataModule(settings.root, batch_size=128, seed=seed)


def make_trainer(settings: Settings, epochs: int, steps: int | float, *callbacks: L.Callback) -> L.Trainer:
    return quiet_trainer(
        epochs, *callbacks, limit_train_batches=steps, limit_val_batches=1.0, accelerator=settings.accelerator,
        default_root_dir=settings.work,
    )  # fmt: skip


def key(row: str, seed: int, settings: Settings) -> str:
    return f"{settings.network}, keep {settings.keep} | {row} | {seed}"


def run_all(settings: Settings, results: dict[str, Any]) -> None:
    runs = {
        key(row, seed, settings): partial(run, row, seed, settings, results)
        for seed in range(settings.seeds)
        for row in ROWS
    }
    stored.complete(settings.results, results, runs, stored.made_with(settings, settings.accelerator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--network", default="vgg11_bn/4", choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the FLOPs")
    parser.add_argument("--training_epochs", type=int, default=4, help="whole epochs before; kept in --work")
    parser.add_argument("--epochs", type=int, default=16, help="so called; a layer is pruned before each of the first")
    parser.add_argument("--steps", type=int, default=16, help="of training in each of them, with 128 images")
    parser.add_argument("--accepted_drop", type=float, default=8.0, help="in points, before the network recovers")
    parser.add_argument("--samples", type=int, default=5, help="choices that an agent learns from at once")
    parser.add_argument("--updates", type=int, default=80, help="how often an agent learns")
    parser.add_argument("--batches", type=int, default=2, help="of 128 validation images that choices are measured on")
    parser.add_argument("--recalibrate", type=int, default=1, help="batches that the statistics of choices follow")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, default=Path("logs/learn_to_prune"), help="where networks are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "learn_to_prune.json")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    settings = parser.parse_args()
    results = stored.load(settings.results)
    if not settings.table:
        run_all(settings, results)
    print(stored.leads(results, AGENTS, "filters chosen by", "agents are ahead by"))


if __name__ == "__main__":
    main()
