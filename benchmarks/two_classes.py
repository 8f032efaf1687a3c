"""Transfer a VGG-16 to cats and dogs and remove 67 % of its filters: what accuracy is left, and how much faster is it?

The network, of a fraction of the usual width, is trained on the eight other classes of CIFAR-10 (JPEG copy). For cats
and dogs it gets a new classifier, which is trained alone at first, then with all the rest; then the Taylor callback
removes filters before each of five epochs, and training goes on. The baseline is the same run without the callback.
Accuracy is that on the test images of the two classes after the last epoch; speed is that of the CPU, the median of
turns of both networks. A VGG-16 of the usual width that loses the same share of each layer is timed as well.

Results are added to a file as they come, the trained networks are kept in ``--work``, and a run that is started again
goes on where it stopped::

    python benchmarks/two_classes.py --root data/cifar10-jpeg [--width 0.25] [--seeds 3]
"""

import argparse
import copy
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
import torchvision
from timing import speed_ups
from training import quiet_trainer, tested

import lightning_prune as lp
from lightning_prune.callbacks import TaylorRankCallback
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.models import ImageClassifier, Optimization, Transfer
from lightning_prune.pruning_plan import plan_in_force

TARGET = ("cat", "dog")
NETWORK, KEEP, STEPS = "vgg16_bn", 0.33, 5
USUAL = f"{NETWORK}, 224x224"
BATCHES = (1, 32)  # for which speed is measured


def data_of(name: str, classes: list[str], settings: argparse.Namespace, seed: int) -> ImageFolderDataModule:
    """Return the images of some classes, from a folder of links to theirs."""
    root = Path(settings.work).absolute() / name
    for part in ("train", "test"):
        (root / part).mkdir(parents=True, exist_ok=True)
        for each in classes:
            link = root / part / each
            if not link.exists():
                link.symlink_to(Path(settings.root).absolute() / part / each, target_is_directory=True)
    return ImageFolderDataModule(str(root), batch_size=settings.batch_size, seed=seed)


def trained_on_others(seed: int, settings: argparse.Namespace) -> Path:
    """Return the file with the weights of a network that knows the other classes, trained now or before."""

    def train() -> dict[str, torch.Tensor]:
        classes = sorted(each.name for each in (Path(settings.root) / "train").iterdir() if each.name not in TARGET)
        L.seed_everything(seed, verbose=False)
        module = ImageClassifier(
            NETWORK, len(classes), (3, 32, 32), {"width": settings.width}, optimization=Optimization(lr=0.05)
        )
        trainer = quiet_trainer(settings.epochs, accelerator="cpu")
        trainer.fit(module, data_of("others", classes, settings, seed))
        return module.network.state_dict()

    file = Path(settings.work) / f"others-{settings.width}-{settings.epochs}-{seed}.pt"
    stored.kept(file, train)
    return file


def transferred(weights: Path, seed: int, settings: argparse.Namespace, *callbacks: L.Callback) -> dict[str, Any]:
    """Train on the two classes, with what callbacks do; return the module and its accuracy on test images."""
    L.seed_everything(seed, verbose=False)
    data = data_of("two", list(TARGET), settings, seed)
    module = ImageClassifier(
        NETWORK, len(TARGET), (3, 32, 32), {"width": settings.width}, weights=str(weights),
        transfer=Transfer(head="classifier", frozen=["features.*"], unfreeze_epoch=1),
        optimization=Optimization(lr=settings.lr, restarts=[settings.transfer]),
    )  # fmt: skip
    trainer = quiet_trainer(settings.transfer + settings.finetune, *callbacks, accelerator="cpu")
    trainer.fit(module, data)
    return {"module": module.eval(), "accuracy": tested(trainer, module, data)}


def speed_up(pruned: torch.nn.Module, whole: torch.nn.Module, batch: int, size: int = 32, rounds: int = 15) -> float:
    images = torch.zeros(batch, 3, size, size)
    return statistics.median(speed_ups(whole, pruned, images, rounds, runs=10, warm_up=2))


def measure(seed: int, settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return both records of a seed."""
    weights = trained_on_others(seed, settings)
    whole = transferred(weights, seed, settings)
    prune = TaylorRankCallback(
        keep=KEEP, metric="channels", start_epoch=settings.transfer, every_n_epochs=1, steps=STEPS, round_to=1
    )
    pruned = transferred(weights, seed, settings, prune)
    plan = plan_in_force(pruned["module"])
    assert plan is not None
    assert plan.budget is not None
    made = stored.made_with(settings)
    return {
        "not pruned": {"accuracy": whole["accuracy"], "made": made},
        "pruned": {
            "accuracy": pruned["accuracy"],
            "filters": plan.budget["achieved"],
            "widths": plan.widths,
            **{f"speed_{n}": speed_up(pruned["module"], whole["module"], n) for n in BATCHES},
            "made": made,
        },
    }


def of_usual_width(widths: dict[str, int], settings: argparse.Namespace) -> dict[str, Any]:
    """Return the speed-up of a VGG-16 of the usual width and for images of the usual size, pruned in proportion."""
    whole = torchvision.models.get_model(NETWORK, weights=None, num_classes=len(TARGET)).eval()
    pruned = copy.deepcopy(whole)
    graph = lp.trace(pruned, torch.zeros(1, 3, 224, 224))
    kept = {name.removeprefix("network."): round(width / settings.width) for name, width in widths.items()}
    lp.prune(pruned, graph.plan({name: torch.arange(width) for name, width in kept.items()}))
    return {"speed_1": speed_up(pruned, whole, 1, 224, rounds=5), "made": stored.made_with(settings)}


def table(results: dict[str, Any]) -> str:
    lines = ["| | test accuracy | filters kept | speed-up, batch 1 | speed-up, batch 32 |", "|---|---|---|---|---|"]
    for setting, rows in stored.by_setting(results).items():
        for row, seeds in rows.items():
            cells = []
            for name in ("accuracy", "filters", *(f"speed_{n}" for n in BATCHES)):
                values = [each[name] for each in seeds.values() if name in each]
                cells.append(stored.spread(values, 3) if values else "")
            lines.append(f"| {setting}: {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--width", type=float, default=0.25, help="of the VGG-16, as a fraction of the usual one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="on the eight other classes")
    parser.add_argument("--transfer", type=int, default=5, help="epochs on the two classes before the first prune")
    parser.add_argument("--finetune", type=int, default=10, help="epochs from the first prune on")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--work", default="logs/two_classes", help="trained networks and links to the images")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "two_classes.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    results = stored.load(settings.results)
    for seed in range(settings.seeds):
        keys = {row: f"{NETWORK}, width {settings.width} | {row} | {seed}" for row in ("not pruned", "pruned")}
        usual = f"{USUAL} | pruned as at width {settings.width} | {seed}"
        for key in (*keys.values(), usual):
            stored.check(results.get(key, {}), stored.made_with(settings))
        if not all(key in results for key in keys.values()):
            results.update({keys[row]: record for row, record in measure(seed, settings).items()})
            stored.save(settings.results, results)
            print(f"seed {seed}: done", flush=True)
        if usual not in results:
            results[usual] = of_usual_width(results[keys["pruned"]]["widths"], settings)
            stored.save(settings.results, results)
    print(table(results))


if __name__ == "__main__":
    main()
