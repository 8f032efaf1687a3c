"""Joint training and pruning of ResNet-20 against pruning between two phases of training, with equal training in all.

Half of the FLOPs leave after half of the training. All arms of a seed have the same initial weights, images in the
same order with the same augmentation, steps, and learning rate, which falls along a cosine in each half. Accuracy is
that on the test images after the last step; nothing is chosen by it.

- joint: `RLJointPruneCallback`; the same with an agent that acts at random, without the penalty, without the model of
  the epochs so far, and with one that is given the epochs in another order; and with the prune compensated;
- fixed weights: the same agent with as many episodes, all before the last epoch of the first half (as AMC does);
- L1: the filters of least norm leave, over the whole network or the same share of each layer;
- compensated default: `PruningCallback` as it comes, with its criterion and its compensation;
- not pruned.

Trained from scratch, or from published weights. The penalty is as strong as the callback makes it. Seconds are of
processor time; a first half that several arms have in common counts for the first of them.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/rl_joint.py --root data/cifar10-jpeg [--weights resnet20.pt --lr 0.02] [--seeds 3] [--table]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import stored
import torch
from torch import Tensor
from training import outcome, quiet_trainer
from typing_extensions import override

from lightning_prune.callbacks import PruningCallback, RLJointPruneCallback
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.graph import ChannelGraph
from lightning_prune.models import ImageClassifier, Optimization
from lightning_prune.planning.by_layer import plan_by_layer
from lightning_prune.pruning_plan import PruningPlan
from lightning_prune.rl.environment_model import EnvironmentModel
from lightning_prune.search import policy_search
from lightning_prune.search.width_search import WidthSearch

KEEP = 0.5
BUDGET: dict[str, Any] = {"keep": KEEP, "round_to": 1, "min_channels": 4}
MOMENTUM = 0.9
Settings = argparse.Namespace


class Joint(RLJointPruneCallback):
    """The callback as it is, and a note of rewards and of where the time goes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rewards: list[list[float]] = []  # of each round: mean of the episodes, and that of the choice in force
        self.norms: list[float] = []  # of what leaves, their sum before each epoch, the last one aside
        self.seconds = {"measuring": 0.0, "learning": 0.0}

    @override
    def begin_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().begin_epoch(trainer, pl_module)
        if "alignment" in self.state.figures:
            self.norms.append(self.state.figures["alignment"])

    @override
    def _play_and_learn(self, trainer: L.Trainer, left: int) -> None:
        began = time.process_time() - self.seconds["measuring"]
        super()._play_and_learn(trainer, left)
        self.seconds["learning"] += time.process_time() - self.seconds["measuring"] - began
        self.rewards.append([self.state.figures["reward"], self.state.figures["best_reward"]])

    @override
    def measure(self, plans: list[PruningPlan], limit: int | None = None) -> Tensor:
        began = time.process_time()
        found = super().measure(plans, limit)
        self.seconds["measuring"] += time.process_time() - began
        return found


class Shuffled(Joint):
    """Gives the agent what the model of the epochs so far has learned of others."""

    @override
    def _make_search(self, steps: int) -> WidthSearch:
        with mock.patch.object(policy_search, "EnvironmentModel", ShuffledModel):
            return super()._make_search(steps)


class ShuffledModel(EnvironmentModel):
    """Takes each epoch for another one."""

    @override
    def representation(self, epoch: Tensor) -> Tensor:
        order = torch.randperm(self.epochs, generator=torch.Generator().manual_seed(0))
        return super().representation(order[epoch.long()])


class Uniform(PruningCallback):
    """Keep the same share of each layer."""

    @override
    def allocate(self, graph: ChannelGraph, scores: dict[str, Tensor], keep: float) -> PruningPlan:
        importance = dict.fromkeys(graph.groups, 1.0)
        return plan_by_layer(graph, importance, scores, keep, self.metric, self.round_to, self.min_channels)


def joint(kind: type[Joint], settings: Settings, seed: int, **changes: Any) -> Joint:
    """Make the callback of an arm with an agent."""
    common: dict[str, Any] = {
        "agent": settings.agent, "start_epoch": settings.epochs // 2, "warmup_epochs": settings.warmup,
        "episodes": settings.episodes, "limit_batches": settings.batches,
        "candidate_batches": settings.recalibrate, "seed": seed,
    }  # fmt: skip
    return kind(**{**BUDGET, **common, **changes})


def half(settings: Settings) -> dict[str, Any]:
    """Return the settings of the arms that prune after half of the training."""
    return {"start_epoch": settings.epochs // 2, **BUDGET}


def optimization(settings: Settings) -> Optimization:
    return Optimization(settings.lr, optimizer_args={"momentum": MOMENTUM}, restarts=[settings.epochs // 2])


def fixed_weights(settings: Settings, seed: int) -> Joint:
    """Make the callback that plays all rounds before the last epoch of the first half, and has no penalty."""
    last = settings.epochs // 2 - 1
    rounds = settings.epochs // 2 - settings.warmup
    return joint(Joint, settings, seed, warmup_epochs=last, rounds=rounds, strength=0.0)


ARMS: dict[str, Callable[[Settings, int], PruningCallback | None]] = {
    "joint": lambda settings, seed: joint(Joint, settings, seed),
    "joint, random agent": lambda settings, seed: joint(Joint, settings, seed, agent="random"),
    "joint, no penalty": lambda settings, seed: joint(Joint, settings, seed, strength=0.0),
    "fixed weights": fixed_weights,
    "L1": lambda settings, seed: PruningCallback(criterion="l1", compensate="none", **half(settings)),
    "uniform L1": lambda settings, seed: Uniform(criterion="l1", compensate="none", **half(settings)),
    "compensated default": lambda settings, seed: PruningCallback(**half(settings)),
    "joint, compensated": lambda settings, seed: joint(Joint, settings, seed, compensate="refit"),
    "not pruned": lambda settings, seed: None,
    "joint, no model of epochs": lambda settings, seed: joint(
        Joint, settings, seed, search_settings={"environment_size": 0}
    ),
    "joint, shuffled model of epochs": lambda settings, seed: joint(Shuffled, settings, seed),
}


def run(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm, the first half only once for those that have it in common."""
    callback, began = ARMS[arm](settings, seed), time.process_time()
    common = None if type(callback) in (Joint, Shuffled) else first_half(seed, settings)
    module, data = make_module(seed, settings), make_data(seed, settings)
    trainer = make_trainer(settings, settings.epochs, [] if callback is None else [callback])
    trainer.fit(module, datamodule=data, ckpt_path=common)
    total = time.process_time() - began
    record = {**outcome(trainer, module, data), "seconds": {"training": total}}
    if isinstance(callback, Joint):
        record |= {"rewards": callback.rewards, "norms": callback.norms}
        record["seconds"] = {"training": total - sum(callback.seconds.values()), **callback.seconds}
    return record


def first_half(seed: int, settings: Settings) -> Path:
    """Return the checkpoint after the first half without pruning, made now or before."""
    schedule = f"{settings.epochs}x{settings.steps}, lr {settings.lr}"
    file = settings.work / f"{title(settings)}, {schedule}, seed {seed}.ckpt"
    if not file.exists():
        trainer = make_trainer(settings, settings.epochs // 2, [])
        trainer.fit(make_module(seed, settings), datamodule=make_data(seed, settings))
        with stored.whole(file) as partial_file:
            trainer.save_checkpoint(partial_file)
    return file


def make_module(seed: int, settings: Settings) -> ImageClassifier:
    L.seed_everything(seed, verbose=False)
    shape = (3, settings.image_size, settings.image_size)
    return ImageClassifier("resnet20", 10, shape, weights=settings.weights, optimization=optimization(settings))


def make_data(seed: int, settings: Settings) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        settings.root, settings.image_size, batch_size=128, crop_padding=settings.image_size // 8, seed=seed
    )


def make_trainer(settings: Settings, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    return quiet_trainer(
        epochs, *callbacks, limit_train_batches=settings.steps, limit_val_batches=1.0, accelerator=settings.accelerator,
        default_root_dir=settings.work,
    )  # fmt: skip


def title(settings: Settings) -> str:
    start = f"from {Path(settings.weights).stem}" if settings.weights else "from scratch"
    size = "" if settings.image_size == 32 else f", {settings.image_size} pixels"
    return f"ResNet-20 {start}, {settings.epochs * settings.steps} steps{size}"


def run_all(settings: Settings, results: dict[str, Any]) -> None:
    runs = {
        f"{title(settings)} | {arm} | {seed}": partial(run, arm, seed, settings)
        for seed in range(settings.seeds)
        for arm in settings.rows
    }
    stored.complete(settings.results, results, runs, stored.made_with(settings, settings.accelerator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--image_size", type=int, default=32, help="smaller for a quick trial")
    parser.add_argument("--weights", help="published ResNet-20 to start from")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), dest="rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="so called; an even number")
    parser.add_argument("--steps", type=int, default=24, help="of training in each of them, with 128 images")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=2, help="epochs before the first episodes")
    parser.add_argument("--agent", default="sac")
    parser.add_argument("--episodes", type=int, default=10, help="in each epoch with episodes")
    parser.add_argument("--batches", type=int, default=8, help="of 128 validation images that rewards are measured on")
    parser.add_argument("--recalibrate", type=int, default=3, help="batches that the statistics of choices follow")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, default=Path("logs/rl_joint"), help="where first halves are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "rl_joint.json")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    settings = parser.parse_args()
    results = stored.load(settings.results)
    if not settings.table:
        run_all(settings, results)
    print(stored.leads(results, "joint", "arm", "joint is ahead by"))


if __name__ == "__main__":
    main()
