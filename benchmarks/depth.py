"""Time trace + magnitude + plan + prune as networks get deeper: each doubling should take about twice as long.

Processor time, least of several rounds, of a stack of layers and of a residual one. What is told are ratios within one
run: seconds depend on the machine. The page is written beside the file of results::

    python benchmarks/depth.py [--rounds 3] [--results FILE] [depths ...]
"""

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import stored
import torch
from torch import Tensor, nn

import lightning_prune as lp

RESULTS = Path(__file__).parent / "results" / "depth.json"
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
    gc.collect()
    start = time.process_time()
    graph = lp.trace(model, torch.zeros(1, 3, 16, 16))
    lp.prune(model, lp.plan(graph, lp.criteria.magnitude(graph), 0.5, "channels", round_to=1))
    return time.process_time() - start


def page(records: dict[str, Any]) -> str:
    """Return a table of all stacks, and the greatest growth of a doubling."""
    lines = ["# Depth", "", "| stack | layers | s | times the half |", "|---|---|---|---|"]
    growth = []
    for kind, record in records.items():
        times = {int(depth): least for depth, least in record["seconds"].items()}
        for depth, least in times.items():
            shown = "-"
            if depth // 2 in times:
                growth.append(least / times[depth // 2])
                shown = f"{growth[-1]:.2f}"
            lines.append(f"| {kind} | {depth} | {least:.2f} | {shown} |")
    if growth:
        lines += ["", f"Greatest growth {max(growth):.2f} (limit {LIMIT} for a doubling)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("depths", nargs="*", type=int, default=[100, 200, 400, 800])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    seconds("residual", 2)  # what PyTorch imports on first use
    records: dict[str, Any] = {}
    for kind in STACKS:
        times = {str(depth): min(seconds(kind, depth) for _ in range(settings.rounds)) for depth in settings.depths}
        records[kind] = {"seconds": times, "made": stored.made_with(settings)}
    print(page(records))
    stored.save(settings.results, records)
    stored.save_page(settings.results, page(records))


if __name__ == "__main__":
    main()
