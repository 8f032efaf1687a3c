"""What a pruning callback costs in `fit`, and what it saves: ResNet-18 at 64x64 on the CPU.

Two runs take turns, step by step, in one process: one with `TaylorRankCallback` and one without any callback. A machine
that gets slower or faster meanwhile does so for both. Each has three epochs: the callback is idle in the first, ranks
in the second and has pruned to half of the FLOPs before the third. A step lasts from one `on_train_batch_start` to the
next, with all hooks; the ratio is the median over pairs of neighbouring steps::

    python benchmarks/overhead.py [--steps 40] [--rounds 3] [--control]

``--control`` compares plain with plain: how far from 1 the ratios are by chance.
"""

import argparse
import logging
import statistics
import threading
import time
import warnings
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import quiet_trainer
from typing_extensions import override

from lightning_prune.callbacks import TaylorRankCallback

# Greatest ratio of step time to that of a plain run, for each epoch.
GOALS = {"idle": 1.01, "ranks with Taylor": 1.10, "pruned to half the FLOPs": 0.65}
WARM_UP = 3  # steps at the start of each epoch, whose memory has still to be found


class Classifier(L.LightningModule):
    """ResNet-18, as anyone would train it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Turns(L.Callback):
    """Time each step, and wait before the next until the other run has made one."""

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore) -> None:
        self.own, self.other = own, other
        self.started: float | None = None
        self.seconds: dict[int, list[float]] = {}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.started is not None:
            if batch_idx > 0:  # what comes before the first batch is the end of an epoch, or a prune
                self.seconds.setdefault(trainer.current_epoch, []).append(time.perf_counter() - self.started)
            self.other.release()
        self.own.acquire()
        self.started = time.perf_counter()


def fit(turns: Turns, callbacks: list[L.Callback], steps: int, batch_size: int) -> None:
    """Train for three epochs; let the other run go on at the end, however it comes."""
    try:
        images = torch.randn(steps * batch_size, 3, 64, 64)
        labels = torch.arange(steps * batch_size) % 10
        trainer = quiet_trainer(3, turns, *callbacks, accelerator="cpu")
        trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size))
    finally:
        turns.other.release(3 * steps)


def compare(callbacks: list[L.Callback], steps: int, batch_size: int) -> list[list[tuple[float, float]]]:
    """Return the seconds of neighbouring steps, plain first, for each epoch."""
    one, two = threading.Semaphore(1), threading.Semaphore(0)  # one of them runs at a time
    plain, other = Turns(one, two), Turns(two, one)
    runs = [
        threading.Thread(target=fit, args=(plain, [], steps, batch_size)),
        threading.Thread(target=fit, args=(other, callbacks, steps, batch_size)),
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    return [list(zip(plain.seconds[epoch], other.seconds[epoch], strict=True))[WARM_UP:] for epoch in range(3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="how often all is done")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="compare plain with plain")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings.threads)
    pairs: list[list[tuple[float, float]]] = [[], [], []]
    for number in range(settings.rounds):
        torch.manual_seed(number)
        callbacks = [] if settings.control else [TaylorRankCallback(keep=0.5, start_epoch=2)]
        for epoch, found in enumerate(compare(callbacks, settings.steps, settings.batch_size)):
            pairs[epoch] += found
    print("| epoch | plain (ms) | with callback (ms) | ratio | goal | |\n|---|---|---|---|---|---|")
    for (name, goal), found in zip(GOALS.items(), pairs, strict=True):
        plain, other = (1000 * statistics.median(side) for side in zip(*found, strict=True))
        ratio = statistics.median(two / one for one, two in found)
        verdict = "control" if settings.control else "met" if ratio <= goal else "MISSED"
        print(f"| {name} | {plain:.1f} | {other:.1f} | {ratio:.3f} | {goal:.2f} | {verdict} |")


if __name__ == "__main__":
    main()
