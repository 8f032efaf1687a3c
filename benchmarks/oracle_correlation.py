"""How well does each criterion rank channels as the oracle does? Spearman on ResNet-20 and a VGG, CIFAR-10 (JPEG copy).

Each network is trained, then each of its channels is pruned alone and the loss measured on images of the validation
split: the absolute change is the oracle. Every registered criterion scores the channels on the same images. Reported is
the rank correlation with the oracle within each group (the mean over the groups) and over all channels, with the scores
as the criterion gives them and divided by their L2 norm in each group; mean and spread over the seeds.

Results are added to a file as they come, trained networks and oracles are kept in ``--work``, and a run that is started
again goes on where it stopped::

    python benchmarks/oracle_correlation.py --root data [--weights resnet20.th] [--epochs 30] [--seeds 3] [--images 512]
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
from scipy.stats import spearmanr
from torch import Tensor
from training import quiet_trainer

import lightning_prune as lp
from lightning_prune.candidates import classification_loss
from lightning_prune.criteria import CRITERIA
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import ImageClassifier, Optimization

GOAL = 0.8  # of the best criterion over all layers
VARIANTS: dict[str, list[dict[str, Any]]] = {  # criteria that have more than one form
    "taylor": [
        {"variant": variant, "normalize": False}
        for variant in ("a", "b", "c", "gate", "sum_then_square", "square_then_sum")
    ]
}
COLUMNS = ("per layer", "all layers", "all layers, L2")
Results = dict[str, dict[str, dict[str, Any]]]  # by network, seed, criterion
Scores = Mapping[str, Tensor]


def data_of(settings: argparse.Namespace, seed: int) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(Path(settings.root) / "cifar10-jpeg"), batch_size=settings.batch_size, seed=seed)


def trained(network: str, seed: int, settings: argparse.Namespace) -> ImageClassifier:
    """Train a network, or load what has been trained before."""
    L.seed_everything(seed, verbose=False)
    published = settings.weights if network == "resnet20" else None
    optimization = Optimization(lr=settings.lr / (10 if published else 1))
    name, _, divisor = network.partition("/")  # "vgg11_bn/4" is a quarter as wide
    arguments = {"width": 1 / int(divisor)} if divisor else {}
    module = ImageClassifier(
        name, 10, (3, 32, 32), network_args=arguments, weights=published, optimization=optimization
    )

    def train() -> dict[str, Tensor]:
        trainer = quiet_trainer(settings.epochs, limit_train_batches=settings.batches or 1.0)
        trainer.fit(module, data_of(settings, seed))
        return module.state_dict()

    schedule = f"{settings.epochs}x{settings.batches}-{settings.lr}"
    path = Path(settings.work) / f"{network.replace('/', '-')}-{seed}-{schedule}.pt"
    module.load_state_dict(stored.kept(path, train))
    return module.to(settings.device).eval()


def batches_of(settings: argparse.Namespace, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return images of the validation split; published weights may have seen them."""
    data = data_of(settings, seed)
    data.setup("fit")
    loader = islice(data.val_dataloader(), math.ceil(settings.images / settings.batch_size))
    moved = ([tensor.to(settings.device) for tensor in batch] for batch in loader)
    return [data.on_after_batch_transfer(batch) for batch in moved]


def criteria_to_compare(seed: int) -> dict[str, dict[str, Any]]:
    """Return every registered criterion but the oracle, by the name it gets in the table."""
    found = {}
    for name in sorted(CRITERIA):
        for form in VARIANTS.get(name, [{}]) if name != "oracle" else ():
            found[f"{name} {form['variant']}" if form else name] = {"name": name, **form}
    return {**found, "random": {"name": "random", "seed": seed}}


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation; scores that are all equal rank nothing."""
    found = float(spearmanr(one, other).statistic)
    return 0.0 if math.isnan(found) else found


def compare(graph: ChannelGraph, scores: Scores, oracle: Scores) -> dict[str, float]:
    groups = [name for name in graph.groups if graph.groups[name].size > 1]
    scaled = {name: scores[name] / scores[name].norm().clamp_min(1e-30) for name in groups}
    truth = torch.cat([oracle[name] for name in groups])
    return {
        "per layer": statistics.mean(correlation(scores[name], oracle[name]) for name in groups),
        "all layers": correlation(torch.cat([scores[name] for name in groups]), truth),
        "all layers, L2": correlation(torch.cat([scaled[name] for name in groups]), truth),
    }


def measure(network: str, seed: int, done: dict[str, Any], settings: argparse.Namespace) -> None:
    """Add what is missing of one network and seed."""
    missing = {name: form for name, form in criteria_to_compare(seed).items() if name not in done}
    if not missing:
        return
    stored.sign(done, stored.made_with(settings, settings.device))
    module, batches = trained(network, seed, settings), batches_of(settings, seed)
    graph = lp.trace(module, module.example_input_array.to(settings.device))
    oracle = lp.criteria.oracle(
        graph, batches, resume=Path(settings.work) / f"oracle-{network.replace('/', '-')}-{seed}"
    )
    for name, form in missing.items():
        done[name] = compare(graph, lp.criteria.score(graph, form, batches, classification_loss), oracle)
    with torch.no_grad():
        right = sum(int((module(images).argmax(1) == labels).sum()) for images, labels in batches)
    done["accuracy"] = right / sum(len(labels) for _, labels in batches)


def table(results: Results) -> str:
    lines = []
    for network, seeds in results.items():
        accuracy = statistics.mean(found["accuracy"] for found in seeds.values())
        lines += [
            "",
            f"{network}, {len(seeds)} seeds, {accuracy:.1%} of these images right; Spearman, mean ± spread",
        ]
        lines += ["", f"| criterion | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        rows = {
            name: [[found[name][column] for found in seeds.values()] for column in COLUMNS]
            for name in criteria_to_compare(seed=0)
            if all(name in found for found in seeds.values())  # else it is yet to be run
        }
        best = max(rows, key=lambda name: max(map(statistics.mean, rows[name][1:])))
        for name, columns in sorted(rows.items(), key=lambda row: -max(map(statistics.mean, row[1][1:]))):
            cells = [stored.spread(values, 3) for values in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        reached = {name: max(map(statistics.mean, columns[1:])) for name, columns in rows.items()}
        taylor = max(value for name, value in reached.items() if name.startswith("taylor"))
        first = "first" if best.startswith("taylor") else f"{reached[best] - taylor:.3f} behind {best}"
        verdict = "met" if taylor >= GOAL else f"missed by {GOAL - taylor:.3f}"
        lines += ["", f"Taylor comes {first}; over all layers it reaches {taylor:.3f} (goal {GOAL}: {verdict})."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar10-jpeg/train and cifar10-jpeg/test")
    parser.add_argument("--weights", help="published weights that ResNet-20 starts from, with a tenth of the rate")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn/4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batches", type=int, default=0, help="training batches per epoch; 0 for all")
    parser.add_argument("--images", type=int, default=512, help="on which loss and criteria are measured")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", default="logs/oracle_correlation", help="trained networks and oracles")
    parser.add_argument("--results", default="benchmarks/results/oracle_correlation.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    results: Results = stored.load(settings.results)
    for network in settings.networks:
        for seed in range(settings.seeds):
            measure(network, seed, results.setdefault(network, {}).setdefault(str(seed), {}), settings)
            stored.save(settings.results, results)
            print(f"{network}, seed {seed}: done", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
