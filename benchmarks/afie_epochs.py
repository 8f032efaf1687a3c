"""Does the entropy of the weights after one epoch tell what that of the trained network tells, and is it of use?

For each network and seed: the network is trained without pruning, and the average filter information entropy of its
layers is measured before the first epoch and after every one; its ranking of the layers is compared (Spearman) with
that after the last epoch, and with the control, which knows the shapes of the layers alone. Then the same training is
pruned once, after its first epoch, to the same budget, which is allocated by the entropy of that moment, by the fully
trained one, by the control, or uniformly; test accuracy is that of the last epoch.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/afie_epochs.py --root data [--networks alexnet_mnist vgg16_cifar10/4] [--epochs 10] [--seeds 3]
"""

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
from scipy.stats import spearmanr
from torch import Tensor
from training import quiet_trainer, tested

import lightning_prune as lp
from lightning_prune.callbacks import PruningCallback
from lightning_prune.datamodules import ImageDataModule, ImageFolderDataModule, MNISTDataModule
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import ImageClassifier, Optimization
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.pruning_plan import PruningPlan

# Network, its settings, its images, and a learning rate that trains it; "/4" is a quarter as wide.
NETWORKS: dict[str, tuple[str, dict[str, float], str, float]] = {
    "alexnet_mnist": ("alexnet", {}, "MNIST", 0.01),
    "vgg11_cifar10": ("vgg11_bn", {}, "CIFAR-10 (JPEG copy)", 0.05),
    "vgg16_cifar10": ("vgg16_bn", {}, "CIFAR-10 (JPEG copy)", 0.05),
    "vgg16_cifar10/4": ("vgg16_bn", {"width": 0.25}, "CIFAR-10 (JPEG copy)", 0.05),
}
ALLOCATIONS = ("entropy, first epoch", "entropy, trained", "control", "uniform")
Results = dict[str, dict[str, Any]]


class Measure(L.Callback):
    """Note the entropy of the layers before the first epoch and after every one."""

    def __init__(self) -> None:
        self.entropies: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the untrained network."""
        self.graph = lp.trace(pl_module, pl_module.example_input_array.to(pl_module.device))
        self.control = lp.criteria.afie_of_shapes(self.graph)
        self.entropies.append(lp.criteria.afie(self.graph))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what the epoch has made of it."""
        self.entropies.append(lp.criteria.afie(self.graph))


class PruneByLayer(PruningCallback):
    """Prune once, after the first epoch, by given importances of the layers; by their entropy now if there are none."""

    def __init__(self, importance: Mapping[str, float] | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.importance = importance

    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        """Allocate by layers."""
        importance = self.importance or lp.criteria.afie(graph)
        self.plan = plan_by_layer(graph, importance, scores, keep, self.metric, self.round_to)
        return self.plan


def data_of(images: str, settings: argparse.Namespace, seed: int) -> ImageDataModule:
    common = {"batch_size": settings.batch_size, "seed": seed}
    if images == "MNIST":
        return MNISTDataModule(root=settings.root, **common)
    # With the random crop and flip that are usual for these images.
    return ImageFolderDataModule(root=str(Path(settings.root) / "cifar10-jpeg"), crop_padding=4, flip=True, **common)


def train(name: str, seed: int, settings: argparse.Namespace, *callbacks: L.Callback) -> float:
    """Return the test accuracy after the last epoch."""
    network, arguments, images, lr = NETWORKS[name]
    L.seed_everything(seed, verbose=False)
    data = data_of(images, settings, seed)
    module = ImageClassifier(network, 10, data.input_shape, network_args=arguments, optimization=Optimization(lr=lr))
    limits = {"limit_train_batches": settings.batches or 1.0, "limit_test_batches": settings.test_batches or 1.0}
    trainer = quiet_trainer(settings.epochs, *callbacks, **limits)
    trainer.fit(module, data)
    return tested(trainer, module, data)


def rank_agreement(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return float(spearmanr([one[name] for name in other], list(other.values())).statistic)


def unpruned(name: str, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    measure = Measure()
    accuracy = train(name, seed, settings, measure)
    start, first, last = measure.entropies[0], measure.entropies[1], measure.entropies[-1]
    return {
        "accuracy": accuracy,
        "entropies": measure.entropies,
        "control": measure.control,
        "untrained against last": rank_agreement(start, last),
        "first against last": rank_agreement(first, last),
        "control against last": rank_agreement(measure.control, last),
        "largest change": max(abs(first[layer] / last[layer] - 1) for layer in last),
    }


def pruned(
    name: str, seed: int, allocation: str, whole: dict[str, Any], settings: argparse.Namespace
) -> dict[str, Any]:
    importance = {
        "entropy, first epoch": None,
        "entropy, trained": whole["entropies"][-1],
        "control": whole["control"],
        "uniform": dict.fromkeys(whole["control"], 1.0),
    }[allocation]
    callback = PruneByLayer(importance, keep=settings.keep, metric=settings.metric, round_to=settings.round_to)
    accuracy = train(name, seed, settings, callback)
    return {"accuracy": accuracy, "widths": callback.plan.widths, "achieved": callback.plan.budget["achieved"]}


def setting_of(name: str, settings: argparse.Namespace) -> str:
    part = f"{settings.batches} batches of " if settings.batches else "batches of "
    return f"{name}; {settings.epochs} epochs of {part}{settings.batch_size}; keep {settings.keep} {settings.metric}"


def show(results: Results) -> None:
    """Print the tables of what is there, mean and standard deviation over the seeds of each setting."""
    settings = sorted({key.rsplit("; seed", 1)[0] for key in results})
    print("| network | untrained | first epoch | control | largest change | seeds |\n|---|---|---|---|---|---|")
    columns = ("untrained against last", "first against last", "control against last", "largest change")
    for setting in settings:
        found = [record["unpruned"] for key, record in results.items() if key.startswith(setting + "; seed")]
        cells = [stored.spread([one[column] for one in found], 3) for column in columns]
        print(f"| {setting} | {' | '.join(cells)} | {len(found)} |")
    print(f"\n| network | unpruned | {' | '.join(ALLOCATIONS)} |\n|---|---|{'---|' * len(ALLOCATIONS)}")
    for setting in settings:
        found = [record for key, record in results.items() if key.startswith(setting + "; seed")]
        accuracies = [[one[row]["accuracy"] for one in found if row in one] for row in ("unpruned", *ALLOCATIONS)]
        print(f"| {setting} | {' | '.join(stored.spread(values, 3) if values else '' for values in accuracies)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST/raw and cifar10-jpeg")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["alexnet_mnist", "vgg16_cifar10/4"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=0, help="training batches per epoch; 0 for all")
    parser.add_argument("--test_batches", type=int, default=0, help="test batches; 0 for all")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--metric", default="flops")
    parser.add_argument("--round_to", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "afie_epochs.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    results: Results = stored.load(settings.results)
    for name in settings.networks:
        for seed in range(settings.seeds):
            record = results.setdefault(f"{setting_of(name, settings)}; seed {seed}", {})
            stored.sign(record, stored.made_with(settings))
            if "unpruned" not in record:
                record["unpruned"] = unpruned(name, seed, settings)
                stored.save(settings.results, results)
            for allocation in ALLOCATIONS:
                if allocation not in record:
                    record[allocation] = pruned(name, seed, allocation, record["unpruned"], settings)
                    stored.save(settings.results, results)
            print(f"{name}, seed {seed}: done", flush=True)
    show(results)


if __name__ == "__main__":
    main()
