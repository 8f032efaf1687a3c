"""Prune trained networks to half the FLOPs by every criterion and fine-tune them alike: what accuracy is left?

Each network is trained once per seed; then, from that same network, every row of `finetune_rows.py` prunes, and the
rest is trained on with the same data order, steps and learning rate (which falls to 0 along a line). Rows prune once,
before the first step, or in several steps over the first half of these. Accuracy is that on the test images after the
last step; nothing is chosen by it, and that on the validation split is kept for what has to be chosen. Criteria that
need data see the same images of the training set. Two controls could embarrass them: random channels, and the same
budget spent uniformly by the L1 norm; the group norm of Torch-Pruning is a rival. A network that is trained on just as
long without being pruned is the baseline. Time is that of a forward pass of 32 images against the whole network.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/criteria_finetune.py --root data/cifar10-jpeg --weights resnet20=resnet20.pt [--networks resnet20]
        [--keep 0.3 0.5 0.7] [--rows L1 LAMP] [--seeds 3] [--table]
    python benchmarks/criteria_finetune.py --root data/cifar10-jpeg --device cuda --networks "resnet56, 400 epochs"
        "vgg16_bn, 400 epochs" --rows "not pruned" "uniform, L1" "group magnitude"    # hours of a GPU
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import stored
import torch
from finetune_rows import EXAMPLE, ROWS, AtEqualCost, Batches
from timing import speed_ups
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.models import Distillation, build_network
from lightning_prune.models.distillation import Teacher
from lightning_prune.models.weights import load_weights

EPOCH = 351  # steps, of 45,000 images
# Network, its settings, steps and learning rate to train it, steps and learning rate to fine-tune it.
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, float], tuple[int, float]]] = {
    "vgg11_bn/4": ("vgg11_bn", {"width": 0.25}, (1400, 0.05), (176, 0.01)),
    "resnet20": ("resnet20", {}, (176, 0.01), (120, 0.01)),
    "resnet56": ("resnet56", {}, (40, 0.01), (60, 0.01)),
    "resnet20, published": ("resnet20", {}, (0, 0.01), (120, 0.01)),
    "resnet56, published": ("resnet56", {}, (0, 0.01), (60, 0.01)),
    "mobilenet_v2/4": ("mobilenet_v2", {"width": 0.25}, (700, 0.05), (120, 0.01)),
    "densenet, growth 12": ("small_densenet.small_densenet", {}, (700, 0.05), (120, 0.01)),
    "resnet56, 400 epochs": ("resnet56", {}, (200 * EPOCH, 0.1), (200 * EPOCH, 0.01)),
    "vgg16_bn, 400 epochs": ("vgg16_bn", {}, (200 * EPOCH, 0.05), (200 * EPOCH, 0.01)),
}
WHOLE, HALF = "not pruned", 0.5
TIMED = 4  # steps, to tell what one takes
Before = Mapping[int, Callable[[list[Optimizer]], None]]


class Runner:
    """One network and seed: its data, and the network that all rows start from."""

    def __init__(self, name: str, seed: int, settings: argparse.Namespace) -> None:
        self.name, self.seed, self.settings = name, seed, settings
        self.data = ImageFolderDataModule(root=settings.root, batch_size=128, seed=seed)
        self.data.prepare_data()
        self.data.setup("fit")
        self.data.setup("test")

    def network(self) -> nn.Module:
        """Return the network to prune, trained now or before."""
        kind, arguments, (steps, lr), _ = NETWORKS[self.name]
        file = Path(self.settings.work) / f"{self.name.replace('/', '-')}-{self.seed}.pt"
        L.seed_everything(self.seed, verbose=False)
        model = build_network(kind, **arguments)

        def train() -> dict[str, torch.Tensor]:
            if self.name in self.settings.weights:
                load_weights(model, self.settings.weights[self.name])
            self.train(model.to(self.settings.device), steps, lr)
            return model.cpu().state_dict()

        model.load_state_dict(stored.kept(file, train))
        return model.to(self.settings.device)

    def train(
        self,
        model: nn.Module,
        steps: int,
        lr: float,
        first_epoch: int = 0,
        before: Before | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """Train for some steps, with something done before some; the epoch decides on the order of the images."""
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
        model.train()
        for done, batch in enumerate(self.training_batches(steps, first_epoch)):
            if before and done in before:
                before[done]([optimizer])
                model.train()
            loss = taught(model, self.served(batch), teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()

    def training_batches(self, steps: int, first_epoch: int) -> Iterator[Sequence[Tensor]]:
        """Yield a batch for each of some steps, as the loader gives it."""
        done, epoch = 0, first_epoch
        while done < steps:
            loader = self.data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                if done == steps:
                    break
                yield batch
                done += 1
            epoch += 1

    @torch.no_grad()
    def accuracy(self, model: nn.Module, images: Any, every: int = 1) -> float:
        """Return the share of images, all or a part of them, that are classified right."""
        model.eval()
        parts = torch.arange(0, len(images), every).split(100)
        batches = (self.served(images.__getitems__(part.tolist())) for part in parts)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
        return right / sum(map(len, parts))

    def batches(self) -> Batches:
        """Return some training images as evaluation sees them, the same for all rows of a seed."""
        part = self.data.train_set
        indices = torch.randperm(len(part), generator=torch.Generator().manual_seed(self.seed))
        parts = indices[: self.settings.images].split(128)
        return [self.served(part.__getitems__(chosen.tolist())) for chosen in parts]

    def served(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a batch as the network sees it, on the device, in the order in memory that a CPU is quickest with."""
        images, labels = self.data.on_after_batch_transfer(tuple(part.to(self.settings.device) for part in batch))
        return images.contiguous(memory_format=torch.channels_last), labels

    def affordable(self, model: nn.Module, teacher: Teacher | None, spent: float, steps: int) -> int:
        """Return how many steps can be had for the seconds of plain steps, once some have been spent on the prune."""
        batch = self.batches()[0]
        seconds = steps * seconds_of_a_step(model, batch, None) - spent
        return max(0, int(seconds / seconds_of_a_step(model, batch, teacher)))

    def row(self, name: str, keep: float, start: nn.Module) -> dict[str, Any]:
        """Prune a copy of the network by one row of the table, if it is to be pruned, and train it on."""
        steps, lr = NETWORKS[self.name][3]
        model, began = copy.deepcopy(start), time.perf_counter()
        spent = 0.0  # seconds of a core
        result: dict[str, Any] = {"flops": 1.0}
        later: dict[int, Callable[[list[Optimizer]], None]] = {}
        if name != WHOLE:
            times = ROWS[name].times
            batches, unspent = self.batches(), time.process_time()
            prune = ROWS[name].begin(model, batches)
            result.update(prune(keep_after(keep, 1, times), []))
            spent = time.process_time() - unspent
            if times == 1:
                result["pruned"] = self.accuracy(model, self.data.test_set, every=5)
            for n in range(1, times):
                step = round(steps / 2 * n / times)
                later[step] = partial(
                    lambda kept, optimizers: result.update(prune(kept, optimizers)), keep_after(keep, n + 1, times)
                )
        result["planned_s"] = time.perf_counter() - began
        teacher = None
        if isinstance(ROWS.get(name), AtEqualCost):
            teacher = Teacher(copy.deepcopy(start), Distillation("")) if ROWS[name].distilled else None
            steps = self.affordable(model, teacher, spent, steps)
            result.update(steps=steps, spent_s=spent)
        self.train(model, steps, lr, first_epoch=1000, before=later, teacher=teacher)
        result["accuracy"] = self.accuracy(model, self.data.test_set)
        result["validation"] = self.accuracy(model, self.data.val_set)
        result["total_s"] = time.perf_counter() - began
        result["time"] = time_left(model, start)
        result["made"] = made_with(self.name, keep, self.settings)
        return result


def taught(model: nn.Module, batch: tuple[Tensor, Tensor], teacher: Teacher | None) -> Tensor:
    """Return the loss of a batch, with a teacher's share in it."""
    images, labels = batch
    said = model(images)
    loss = F.cross_entropy(said, labels)
    return loss if teacher is None else teacher.loss(images, said, loss)


def seconds_of_a_step(model: nn.Module, batch: tuple[Tensor, Tensor], teacher: Teacher | None) -> float:
    """Return the seconds of a core that a step of training takes; the model is not changed."""
    model = copy.deepcopy(model).train()
    seconds = []
    for _ in range(TIMED):
        began = time.process_time()
        taught(model, batch, teacher).backward()
        seconds.append(time.process_time() - began)
    return min(seconds)


def made_with(network: str, keep: float, settings: argparse.Namespace) -> dict[str, Any]:
    return stored.made_with(settings, settings.device, keep=keep, schedule=NETWORKS[network][2:])


def keep_after(keep: float, step: int, steps: int) -> float:
    return keep if step == steps else 1 - (1 - keep) * step / steps


def time_left(model: nn.Module, original: nn.Module, rounds: int = 15) -> float:
    """Return the time of a forward pass of 32 images as a fraction of the original's, measured turn and turn about."""
    images = torch.randn(32, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(0))
    # copies: memory that training has not scattered
    original, model = copy.deepcopy(original).cpu(), copy.deepcopy(model).cpu()
    return 1 / statistics.median(speed_ups(original, model, images, rounds, runs=3, warm_up=1))


def key_of(network: str, row: str, keep: float, seed: int) -> str:
    return f"{network}{'' if keep == HALF else f', keep {keep}'} | {row} | {seed}"


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    for seed in range(settings.seeds):
        for network in settings.networks:
            wanted = {key_of(network, row, keep, seed): (row, keep) for keep in settings.keep for row in settings.rows}
            missing = {
                key: (row, keep)
                for key, (row, keep) in wanted.items()
                if not complete(results.get(key, {})) and differs(row, keep, network)
            }
            if not missing:
                continue
            for key, (_, keep) in wanted.items():
                stored.check(results.get(key, {}), made_with(network, keep, settings))
            runner = Runner(network, seed, settings)
            start = runner.network()
            for key, (row, keep) in missing.items():
                results[key] = runner.row(row, keep, start)
                stored.save(settings.results, results)
                print(f"{key}: {results[key]['accuracy']:.4f} in {results[key]['total_s']:.0f} s", flush=True)


def complete(record: Mapping[str, Any]) -> bool:
    """Say whether a record has all that is noted today; earlier ones lack something, and are made anew."""
    return {"accuracy", "validation", "time"} <= record.keys()


def differs(row: str, keep: float, network: str) -> bool:
    """Say whether no other row or budget gives the same: one does where nothing is pruned, and without blocks."""
    return keep == HALF if row == WHOLE else network.startswith("resnet") or not ROWS[row].inside_blocks


def table(results: dict[str, Any]) -> str:
    lines = []
    for setting, found in stored.by_setting(results).items():
        rows = {row: list(seeds.values()) for row, seeds in found.items()}
        lines += [
            f"\n{setting}, CIFAR-10 (JPEG copy):\n",
            "| criterion | seeds | FLOPs kept | time kept | fine-tuned test accuracy, last step (%) |",
            "|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda row: -statistics.fmean(each["accuracy"] for each in rows[row])):
            flops, times, accuracies = (
                [each[name] for each in rows[row] if name in each] for name in ("flops", "time", "accuracy")
            )
            cells = (
                stored.spread(flops, 3),
                stored.spread(times, 2) if times else "",
                stored.spread([100 * each for each in accuracies], 2),
            )
            lines.append(f"| {row} | {len(accuracies)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assignment(text: str) -> tuple[str, str]:
    network, _, file = text.partition("=")
    return network, file


def add_usual(parser: argparse.ArgumentParser, results: str, devices: Sequence[str] = ("cpu",)) -> None:
    """Add the options of all scripts that begin from these networks: where these and the results are, and the table."""
    parser.add_argument("--device", default="cpu", choices=devices, help="to train on; times are of the CPU")
    parser.add_argument("--work", default="logs/criteria_finetune", help="where trained networks are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / results)
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")


def run_or_show(
    settings: argparse.Namespace,
    run: Callable[[argparse.Namespace, dict[str, Any]], None],
    table: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Run what is missing, unless the table alone is asked for; print the table, and return the results."""
    settings.weights = dict(settings.weights)
    results = stored.load(settings.results)
    if not settings.table:
        run(settings, results)
    print(table(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument(
        "--weights", nargs="+", type=assignment, default=[], help="published weights to start from, as network=file"
    )
    parser.add_argument("--networks", nargs="+", default=["vgg11_bn/4", "resnet20"], choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=[HALF], help="of the FLOPs")
    parser.add_argument("--rows", nargs="+", default=[WHOLE, *ROWS], choices=[WHOLE, *ROWS], metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="training images that criteria may look at")
    add_usual(parser, "criteria_finetune.json", ["cpu", "cuda"])
    settings = parser.parse_args()
    run_or_show(settings, run, table)


if __name__ == "__main__":
    main()
