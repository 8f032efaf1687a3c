"""Ask for a drop of at most one point of validation accuracy: how small does the network get, and what is it worth?

A trained network trains on with ``PruningCallback(max_drop=0.01, monitor="val/accuracy", distill=True)``, which takes a
tenth of the FLOPs that are left every second epoch, and the last prune back that the metric does not recover from. The
digits are those of UCI; on CIFAR-10 the networks are those that `criteria_finetune.py` starts from, and an epoch is a
part of the training images. A run ends when a prune has been taken back, or after so many epochs. Test images are
looked at before and after, and the callback knows nothing of them.

The page is written beside the file of results, which is added to as it comes::

    python benchmarks/stop_by_accuracy.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt
        [--networks digits vgg11_bn/4 resnet20] [--seeds 3] [--results FILE]
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
from criteria_finetune import Runner, add_usual, assignment, run_or_show
from training import outcome, quiet_trainer, tested

from lightning_prune.callbacks import PruningCallback
from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.models import ImageClassifier

ASKED = 0.01
FIRST_EPOCHS = 20  # of the digits
# Settings of the module, most epochs, batches of an epoch, and a learning rate that leaves a trained network as it is.
NETWORKS: dict[str, tuple[dict[str, Any], int, float, float]] = {
    "digits": ({"network": "digits", "input_shape": (1, 8, 8)}, 60, 1.0, 0.01),
    "vgg11_bn/4": ({"network": "vgg11_bn", "network_args": {"width": 0.25}}, 41, 90, 0.002),
    "resnet20": ({"network": "resnet20"}, 25, 90, 0.002),
}


class Ending(L.Callback):
    """Ends a run when its callback prunes no more."""

    def __init__(self, pruner: PruningCallback) -> None:
        self.pruner = pruner

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop once the last prune has been taken back."""
        trainer.should_stop = self.pruner.state.stop.over


def started(name: str, seed: int, settings: argparse.Namespace) -> tuple[ImageClassifier, Any]:
    """Return a trained network, trained now or before, and its data."""
    module = ImageClassifier(**NETWORKS[name][0], optimization={"lr": NETWORKS[name][3], "weight_decay": 5e-4})
    if name != "digits":
        runner = Runner(name, seed, settings)
        module.network.load_state_dict(runner.network().state_dict())
        return module, runner.data
    data = DigitsDataModule(val_fraction=0.25, seed=seed)

    def train() -> dict[str, torch.Tensor]:
        quiet_trainer(FIRST_EPOCHS).fit(module, data)
        return module.network.state_dict()

    module.network.load_state_dict(stored.kept(Path(settings.work) / f"digits-{seed}.pt", train))
    return module, data


def run(name: str, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Prune while the metric stays within what is asked; returns what came of it."""
    L.seed_everything(seed, verbose=False)
    module, data = started(name, seed, settings)
    _, epochs, batches, _ = NETWORKS[name]
    pruner = PruningCallback(
        max_drop=ASKED, monitor="val/accuracy", every_n_epochs=2, distill=True, validate_batches=0, save_result=False
    )
    began = time.perf_counter()
    whole = tested(quiet_trainer(0), module, data)
    trainer = quiet_trainer(
        epochs, pruner, Ending(pruner), check_val_every_n_epoch=1, limit_val_batches=1.0, limit_train_batches=batches
    )
    trainer.fit(module, data)
    stop = pruner.state.stop
    measured = quiet_trainer(0, limit_val_batches=1.0).validate(module, data, verbose=False)[0]["val/accuracy"]
    return {
        **outcome(trainer, module, data),
        "whole": whole,
        "validation": measured,
        "reference": stop.reference,
        "prunes": pruner.steps_done,
        "taken_back": stop.over,
        "epochs": trainer.current_epoch,
        "seconds": time.perf_counter() - began,
    }


def page(records: dict[str, Any]) -> str:
    """Return what was asked and what came of it, by network and seed."""
    lines = [
        "# Stopping by accuracy",
        "",
        f"Asked: at most {100 * ASKED:.0f} point of validation accuracy less than before the first prune.",
        "",
        "| network | seed | validation before, after (drop) | test before, after | FLOPs kept | prunes | ended by | "
        "epochs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, record in records.items():
        before, after = record["reference"], record["validation"]
        ended = "a prune taken back" if record["taken_back"] else "the last epoch"
        cells = [
            *key.split(" | "), f"{before:.4f}, {after:.4f} ({100 * (before - after):.1f})",
            f"{record['whole']:.4f}, {record['accuracy']:.4f}", f"{record['flops']:.3f}", str(record["prunes"]), ended,
            str(record["epochs"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_all(settings: argparse.Namespace, records: dict[str, Any]) -> None:
    """Run what is missing; each record and the page are saved when they are there."""
    for name in settings.networks:
        for seed in range(settings.seeds):
            made, key = stored.made_with(settings), f"{name} | {seed}"
            if key not in records:
                records[key] = {**run(name, seed, settings), "made": made}
                stored.save(settings.results, records)
                stored.save_page(settings.results, page(records))
            stored.check(records[key], made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--weights", nargs="+", type=assignment, default=[], help="published weights, as network=file")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    add_usual(parser, "stop_by_accuracy.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_or_show(settings, run_all, page)


if __name__ == "__main__":
    main()
