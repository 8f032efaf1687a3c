"""Time trace + magnitude + plan + prune as networks get deeper: each doubling should take about twice as long.

Processor time, least of several rounds, of a stack of layers and of a residual one. What is told are ratios within one
run: seconds depend on the machine::

    python benchmarks/depth.py [--rounds 3] [depths ...]
"""

import argparse
import itertools
import time

import torch
from torch import Tensor, nn

import lightning_prune as lp

LIMIT = 2.6  # of what a doubling may take


class Residual(nn.Module):
    """A layer whose output is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: Tensor) -> Tensor:
        """Add what the layer makes of the input to it."""
        return x + self.layer(x)


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


STACKS = {"plain": layer, "residual": Residual}


def seconds(kind: str, depth: int) -> float:
    layers = [STACKS[kind]() for _ in range(depth)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    start = time.process_time()
    graph = lp.trace(model, torch.zeros(1, 3, 16, 16))
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), 0.5, "channels", round_to=1))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("depths", nargs="*", type=int, default=[100, 200, 400, 800])
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    seconds("residual", 2)  # what PyTorch imports on first use
    print("| stack | layers | s | times the half |\n|---|---|---|---|")
    growth = []
    for kind in STACKS:
        times = [min(seconds(kind, depth) for _ in range(settings.rounds)) for depth in settings.depths]
        print(f"| {kind} | {settings.depths[0]} | {times[0]:.2f} | - |")
        for depth, (shallower, deeper) in zip(settings.depths[1:], itertools.pairwise(times), strict=True):
            growth.append(deeper / shallower)
            print(f"| {kind} | {depth} | {deeper:.2f} | {growth[-1]:.2f} |", flush=True)
    print(f"greatest growth {max(growth):.2f} (limit {LIMIT} for a doubling)")


if __name__ == "__main__":
    main()
