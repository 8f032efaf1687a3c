"""How fast small images are served, and what that costs: against torchvision, and against the training that eats them.

1. Images per second at CIFAR size, batch 128, crop, flip and normalise: our data module against torchvision's data set
   and transforms in a DataLoader with two workers, which have started before the clock does. Epochs take turns in one
   process; the ratio is the median over pairs of neighbouring epochs.
2. Share of the time that training ResNet-20 on the CPU waits for data: reading, augmentation and all.
3. Greatest memory of preparing and serving all images, above that of a process that has served a few, as a multiple of
   their bytes. Each kind of source has a process of its own.

Data of the right shape are made up, unless ``--root`` names the folder of CIFAR-10 for the first two::

    python benchmarks/data_throughput.py [--root data] [--rounds 7] [--threads 1]
"""

import argparse
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from lightning_prune.datamodules import CIFAR10DataModule, CIFAR100DataModule, ImageFolderDataModule, cifar
from lightning_prune.datamodules.loading import PixelImages
from lightning_prune.models import build_network

GOALS = {"images per second, ours / torchvision": 10.0, "share of waiting": 0.03, "memory / bytes of images": 1.2}
SOURCES = {"CIFAR-10": (datasets.CIFAR10, "labels"), "CIFAR-100": (datasets.CIFAR100, "fine_labels")}
STEPS = 20  # of ResNet-20
FILES = 20_000  # images of the folder whose memory is measured


class MadeUpCIFAR10(CIFAR10DataModule):
    """Serve pixels that are given."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        super().__init__(val_fraction=0.001)
        self.images = PixelImages(pixels, targets)

    def check_files(self) -> None:
        """Nothing is read."""

    def load_images(self, train: bool) -> PixelImages:
        """Return the same images for training and test."""
        return self.images


class MadeUpPeer(datasets.CIFAR10):
    """torchvision's data set with pixels that are given; only what reads the files is left out."""

    def __init__(self, pixels: Tensor, targets: Tensor, transform: Any) -> None:
        self.data = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.transform, self.target_transform = transform, None


def ours(data: CIFAR10DataModule) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch)


def images_per_second(batches: Any) -> float:
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return count / (time.perf_counter() - start)


def compare(data: CIFAR10DataModule, rounds: int) -> list[tuple[float, float]]:
    """Return images per second of neighbouring epochs, ours first."""
    assert data.train_set is not None
    images: Any = data.train_set.images
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(data.augmentation.mean, data.augmentation.std),
        ]
    )  # fmt: skip
    peer_set = MadeUpPeer(images.pixels, images.targets, transform)
    peer = DataLoader(peer_set, data.batch_size, shuffle=True, num_workers=2, persistent_workers=True)
    images_per_second(peer)
    return [(images_per_second(ours(data)), images_per_second(peer)) for _ in range(rounds)]


def share_of_waiting(data: CIFAR10DataModule) -> float:
    """Return the part of the time of training ResNet-20 that goes by before a batch is there."""
    network = build_network("resnet20")
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    waited, trained = [], []
    batches = ours(data)
    for _ in range(STEPS):
        start = time.perf_counter()
        images, labels = next(batches)
        ready = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        waited.append(ready - start)
        trained.append(time.perf_counter() - ready)
    return sum(waited) / (sum(waited) + sum(trained))  # with the start of the epoch, where the order is drawn


# -- memory ------------------------------------------------------------------------------------------------------------


def write_cifar(root: Path, source: Any, labels_key: str, count: int) -> None:
    (root / source.base_folder).mkdir(parents=True)
    entries = [*source.train_list, *source.test_list]
    for name, _ in entries:
        images = count * 5 if name == "train" else count
        pixels = numpy.random.default_rng(0).integers(0, 256, (images, 3072), dtype=numpy.uint8)
        labels = (numpy.arange(images) % 10).tolist()
        with (root / source.base_folder / name).open("wb") as file:
            pickle.dump({b"data": pixels, labels_key.encode(): labels}, file, protocol=4)


def write_folder(root: Path, count: int) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    for part, share in (("train", 0.9), ("test", 0.1)):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for number in range(int(count * share / 2)):
                Image.fromarray(pixels).save(root / part / label / f"{number}.jpg")


def peak_bytes() -> int:
    # Of this program alone; getrusage counts what the process was before it became this program.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def serve(module: Any, root: str) -> int:
    """Prepare and serve all images; return their bytes."""
    data = module(root)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    for loader in (data.train_dataloader(), data.test_dataloader()):
        for batch in loader:
            data.on_after_batch_transfer(batch)
    return sum(part.images.pixels.numel() for part in (data.train_set, data.test_set))


def memory(kind: str, few: str, many: str) -> float:
    """Return the memory of serving many images beyond that of a few, as a multiple of their bytes."""
    cifar.check_integrity = lambda path, checksum: True  # made-up files have other checksums
    module = {"CIFAR-10": CIFAR10DataModule, "CIFAR-100": CIFAR100DataModule, "folder": ImageFolderDataModule}[kind]
    serve(module, few)
    before = peak_bytes()
    size = serve(module, many)
    return (peak_bytes() - before) / size


def memory_in_a_process(kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        for root, count, files in ((few, 40, 100), (many, 10_000, FILES)):
            if kind == "folder":
                write_folder(root, files)
            else:
                source, key = {
                    "CIFAR-10": (datasets.CIFAR10, "labels"),
                    "CIFAR-100": (datasets.CIFAR100, "fine_labels"),
                }[kind]
                write_cifar(root, source, key, count)
        command = [sys.executable, __file__, "--memory", kind, str(few), str(many)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10 (default: made-up images)")
    parser.add_argument("--images", type=int, default=10_000, help="number of made-up images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the training process")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.memory:
        print(memory(*settings.memory))
        return
    if settings.root:
        data = CIFAR10DataModule(settings.root)
    else:
        pixels = torch.randint(0, 256, (settings.images, 3, 32, 32), dtype=torch.uint8)
        data = MadeUpCIFAR10(pixels, torch.arange(settings.images) % 10)
    data.setup("fit")
    pairs = compare(data, settings.rounds)
    ratio = statistics.median(one / other for one, other in pairs)
    own, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    fast, waiting, most = GOALS.values()
    print("| what | figure | goal | |\n|---|---|---|---|")
    print(f"| images per second: ours {own:,.0f}, torchvision {peer:,.0f} | {ratio:.1f}x | >= {fast:.0f}x | "
          f"{'met' if ratio >= fast else 'MISSED'} |")  # fmt: skip
    share = share_of_waiting(data)
    print(f"| ResNet-20 on the CPU waits for data | {share:.2%} | <= {waiting:.0%} | "
          f"{'met' if share <= waiting else 'MISSED'} |")  # fmt: skip
    for kind in ("CIFAR-10", "CIFAR-100", "folder"):
        found = memory_in_a_process(kind)
        print(f"| greatest memory, {kind} | {found:.2f} x the bytes | <= {most:.1f} x | "
              f"{'met' if found <= most else 'MISSED'} |")  # fmt: skip


if __name__ == "__main__":
    main()
