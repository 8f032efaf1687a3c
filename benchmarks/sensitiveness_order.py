"""Does the order of the layers by sensitiveness settle early, and is it of use? Conv-4/MNIST and ResNet-20/CIFAR-10.

Each network is trained; for each kind of damage the sensitiveness of its layers is measured on the validation split
after an early epoch and after the last one, and the two orders are compared (Spearman). Then the trained network is
pruned once to the same FLOPs with the allocation by the early and by the final sensitiveness, and uniformly, within
layers by L1 each time, and fine-tuned; test accuracy is that of the last epoch. CIFAR-10 is the JPEG copy.

Results are added to a file as they come, trained networks are kept in ``--work``, and a run that is started again goes
on where it stopped::

    python benchmarks/sensitiveness_order.py --root data [--networks conv4 resnet20] [--epochs 20] [--early 2]
"""

import argparse
import math
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import stored
from scipy.stats import spearmanr
from torch import Tensor
from training import quiet_trainer, tested

import lightning_prune as lp
from lightning_prune.criteria import l1, layer_scores, sensitiveness
from lightning_prune.datamodules import ImageDataModule, ImageFolderDataModule, MNISTDataModule
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import ImageClassifier, Optimization
from lightning_prune.planning.by_layer import plan_by_layer

DAMAGES = ("random", "magnitude", "noise")
FINE_TUNE = 0.1  # learning rate after the prune, as a fraction of that of training
LEARNING_RATES = {"conv4": 0.01, "lenet": 0.01}
Results = dict[str, dict[str, dict[str, Any]]]  # by network, seed, what


def data_of(network: str, seed: int, settings: argparse.Namespace) -> ImageDataModule:
    common = {"batch_size": settings.batch_size, "seed": seed}
    if network in LEARNING_RATES:
        return MNISTDataModule(root=settings.root, **common)
    return ImageFolderDataModule(root=str(Path(settings.root) / "cifar10-jpeg"), **common)


def make(network: str, data: ImageDataModule, lr_factor: float = 1.0) -> ImageClassifier:
    lr = LEARNING_RATES.get(network, 0.1) * lr_factor
    return ImageClassifier(network, 10, data.input_shape, optimization=Optimization(lr=lr))


def fit(module: ImageClassifier, data: ImageDataModule, epochs: int, settings: argparse.Namespace, *more: Any) -> float:
    """Train, and return the test accuracy after the last epoch."""
    limits = {"limit_train_batches": settings.batches or 1.0, "limit_test_batches": settings.test_batches or 1.0}
    trainer = quiet_trainer(epochs, *more, **limits)
    if epochs:
        trainer.fit(module, data)
    return tested(trainer, module, data)


class KeepEarly(L.Callback):
    """Keep the weights of an early epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights after the last early epoch."""
        if trainer.current_epoch + 1 == self.epochs:
            self.weights = {name: value.clone().cpu() for name, value in pl_module.state_dict().items()}


def trained(network: str, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Return the weights after the early and the last epoch, and the accuracy; trained now or before."""

    def train() -> dict[str, Any]:
        L.seed_everything(seed, verbose=False)
        data, keep = data_of(network, seed, settings), KeepEarly(settings.early)
        module = make(network, data)
        accuracy = fit(module, data, settings.epochs, settings, keep)
        return {"early": keep.weights, "last": module.state_dict(), "accuracy": accuracy}

    schedule = f"{settings.early}-{settings.epochs}x{settings.batches}x{settings.batch_size}"
    path = Path(settings.work) / f"{network}-{seed}-{schedule}.pt"
    return stored.kept(path, train)


def batches_of(data: ImageDataModule, settings: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    data.setup("fit")
    loader = islice(data.val_dataloader(), math.ceil(settings.images / settings.batch_size))
    return [data.on_after_batch_transfer(batch) for batch in loader]


def graph_of(network: str, data: ImageDataModule, weights: Mapping[str, Tensor]) -> ChannelGraph:
    module = make(network, data, FINE_TUNE)
    module.load_state_dict(weights)
    return lp.trace(module, module.example_input_array)


def pruned_accuracy(
    network: str,
    seed: int,
    importance: Mapping[str, float],
    weights: Mapping[str, Tensor],
    settings: argparse.Namespace,
) -> dict[str, float]:
    """Prune the trained network by an allocation, fine-tune, and test."""
    L.seed_everything(seed, verbose=False)
    data = data_of(network, seed, settings)
    graph = graph_of(network, data, weights)
    plan = plan_by_layer(graph, importance, l1(graph), settings.keep, "flops", settings.round_to)
    lp.prune(graph.model, plan)
    accuracy = fit(graph.model, data, settings.finetune, settings)  # type: ignore[arg-type]
    return {"accuracy": accuracy, "flops": plan.budget["achieved"]}


def measure(network: str, seed: int, done: dict[str, Any], settings: argparse.Namespace, save: Any) -> None:
    """Add what is missing of one network and seed."""
    stored.sign(done, stored.made_with(settings))
    weights = trained(network, seed, settings)
    done["accuracy"] = weights["accuracy"]
    data = data_of(network, seed, settings)
    batches = batches_of(data, settings)
    for damage in DAMAGES:
        if damage not in done:
            early, last = (
                sensitiveness(graph_of(network, data, weights[when]), batches, damage, settings.levels, settings.draws)
                for when in ("early", "last")
            )
            order = float(spearmanr(list(early.values()), list(last.values())).statistic)
            # Layers that all bear the same are in no order.
            done[damage] = {"early": early, "last": last, "order": 0.0 if math.isnan(order) else order}
            save()
    allocations = {f"{damage}, {when}": done[damage][when] for damage in DAMAGES for when in ("early", "last")}
    importances = {name: layer_scores(found, settings.ratio) for name, found in allocations.items()}
    importances["uniform"] = dict.fromkeys(done[DAMAGES[0]]["last"], 1.0)
    pruned = done.setdefault("pruned", {})
    for name, importance in importances.items():
        if name not in pruned:
            pruned[name] = pruned_accuracy(network, seed, importance, weights["last"], settings)
            save()


def spread(values: list[float]) -> str:
    return stored.spread(values, 3)


def table(results: Results) -> str:
    lines = []
    for network, seeds in results.items():
        found = list(seeds.values())
        uniform = [each["pruned"]["uniform"]["accuracy"] for each in found]
        lines += ["", f"{network}, {len(found)} seeds, accuracy {spread([each['accuracy'] for each in found])}", ""]
        lines += ["| damage | order, early against last | pruned, early | pruned, last | pruned, uniform |"]
        lines += ["|---|---|---|---|---|"]
        for damage in DAMAGES:
            order = spread([each[damage]["order"] for each in found])
            cells = [
                spread([each["pruned"][f"{damage}, {when}"]["accuracy"] for each in found])
                for when in ("early", "last")
            ]
            lines.append(f"| {damage} | {order} | {' | '.join(cells)} | {spread(uniform)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds MNIST and cifar10-jpeg")
    parser.add_argument("--networks", nargs="+", default=["conv4", "resnet20"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--early", type=int, default=2, help="the epoch whose order is compared with the last")
    parser.add_argument("--finetune", type=int, default=2, help="epochs after the prune, at a tenth of the rate")
    parser.add_argument("--batches", type=int, default=0, help="training batches per epoch; 0 for all")
    parser.add_argument("--test-batches", type=int, default=0, help="test batches; 0 for all")
    parser.add_argument("--images", type=int, default=1024, help="on which sensitiveness is measured")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--ratio", default="inverse")
    parser.add_argument("--keep", type=float, default=0.5, help="of the FLOPs")
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--work", default="logs/sensitiveness_order", help="trained networks")
    parser.add_argument("--results", default="benchmarks/results/sensitiveness_order.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    results: Results = stored.load(settings.results)
    save = partial(stored.save, settings.results, results)
    for network in settings.networks:
        for seed in range(settings.seeds):
            measure(network, seed, results.setdefault(network, {}).setdefault(str(seed), {}), settings, save)
            print(f"{network}, seed {seed}: done", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
