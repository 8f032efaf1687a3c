"""What compensation costs on a large network: seconds of a core, memory, and how far the outputs are from those before.

A torchvision network gets random weights, scales and statistics, since no trained ones are at hand, and loses half its
FLOPs by the L1 norm, plainly and with a refit on random images of 224 x 224. The error of the logits is measured on
other images: the squared distance from those before as a share of their variance, so that 1 is that of their mean.
Memory is what the process has taken at its peak beyond what it held when the network and the images were there::

    python benchmarks/compensation_cost.py [--networks resnet50] [--images 64] [--batch-size 8]
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import stored
import torch
import torchvision
from torch import Tensor, nn

import lightning_prune as lp

SHAPE = (3, 224, 224)
TOLD = 16  # other images, that the error is measured on
HALF = 0.5


def network(name: str) -> nn.Module:
    """Return a network whose batch normalisation is as if it had been trained."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, 0, 0.2)
    lp.surgery.recalibrate(model, [images(TOLD)])
    return model


def images(count: int) -> Tensor:
    """Return random images, each of another contrast and with coarse patterns, so that logits differ."""
    coarse = torch.randn(count, SHAPE[0], 7, 7)
    patterns = nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    return (patterns + 0.3 * torch.randn(count, *SHAPE)).contiguous(memory_format=torch.channels_last)


def resident(field: str) -> float:
    """Return a figure of the memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@torch.no_grad()
def logits_error(wanted: Tensor, found: Tensor) -> float:
    """Return the squared error as a share of the variance over the images."""
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def measured(name: str, method: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Prune a copy of a network, and return what that takes and what it leaves."""
    model = network(name)
    batches = list(images(settings.images).split(settings.batch_size))
    graph = lp.trace(model, batches[0][:1])
    plan = lp.plan(graph, lp.criteria.magnitude(graph), HALF)
    others = images(TOLD)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(others)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, began = resident("VmRSS"), time.process_time()
    lp.prune(pruned, plan, compensate=method, batches=batches)
    seconds = time.process_time() - began
    beyond = resident("VmHWM") - held
    with torch.no_grad():
        error = logits_error(wanted, pruned(others))
    return {"error": error, "seconds": seconds, "mib": beyond, "flops": plan.budget["achieved"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50"])
    parser.add_argument("--methods", nargs="+", default=["none", "statistics", "refit"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "compensation_cost.json")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    results = stored.load(settings.results)
    for name in settings.networks:
        for method in settings.methods:
            key = f"{name}, {settings.images} images | {method} | 0"
            if key not in results:
                results[key] = {**measured(name, method, settings), "made": stored.made_with(settings)}
                stored.save(settings.results, results)
            print(key, {field: value for field, value in results[key].items() if field != "made"}, flush=True)


if __name__ == "__main__":
    main()
