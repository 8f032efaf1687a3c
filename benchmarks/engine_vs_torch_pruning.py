"""Time trace + magnitude + plan + prune against the constructor and one step of Torch-Pruning.

Same model, same process, alternating, median of several rounds, each on a fresh copy. Both remove half of the channels
by L1 magnitude, ranked over all layers. Needs the ``benchmark`` extra::

    python benchmarks/engine_vs_torch_pruning.py [--rounds 5] [--steps 50] [networks ...]
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch_pruning
import torchvision
from torch import nn

import lightning_prune as lp

NETWORKS = [
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "alexnet", "densenet121", "inception_v3", "efficientnet_v2_s",
    "convnext_tiny", "regnet_y_16gf", "vit_b_16", "shufflenet_v2_x1_0", "swin_t",
]  # fmt: skip
LIMIT, MEAN_LIMIT, ITERATIVE_LIMIT = 0.8, 0.2, 0.1


def ours(model: nn.Module, x: torch.Tensor, steps: int) -> None:
    graph = lp.trace(model, x)
    for step in range(1, steps + 1):
        plan = lp.plan(graph, lp.criteria.magnitude(graph), 1 - 0.5 * step / steps, "channels", round_to=1)
        lp.prune(model, plan)


def theirs(model: nn.Module, x: torch.Tensor, steps: int) -> None:
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
    )
    for _ in range(steps):
        pruner.step()


def seconds(
    run: Callable[[nn.Module, torch.Tensor, int], None], model: nn.Module, x: torch.Tensor, steps: int
) -> float:
    model = copy.deepcopy(model)
    start = time.perf_counter()
    run(model, x, steps)
    return time.perf_counter() - start


def compare(name: str, rounds: int, steps: int) -> tuple[float, float, str]:
    """Return the seconds that either takes, and what Torch-Pruning raises, if it does."""
    torch.manual_seed(0)
    size = 299 if name == "inception_v3" else 224
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if size == 299 else {})).eval()
    x = torch.randn(1, 3, size, size)
    times: dict[Callable[..., None], list[float]] = {ours: [], theirs: []}
    failure = ""
    for _ in range(rounds):
        times[ours].append(seconds(ours, model, x, steps))
        try:
            times[theirs].append(seconds(theirs, model, x, steps))
        except Exception as raised:
            failure = repr(raised)
            break
    return statistics.median(times[ours]), statistics.median(times[theirs] or [float("nan")]), failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="prune in this many steps with one graph")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(
        f"| network | lightning-prune (s) | torch-pruning {torch_pruning.__version__} (s) | ratio |\n|---|---|---|---|"
    )
    ratios = []
    for name in settings.networks:
        mine, other, failure = compare(name, settings.rounds, settings.steps)
        if failure:
            print(f"| {name} | {mine:.3f} | fails: {failure} | - |", flush=True)
            continue
        ratios.append(mine / other)
        print(f"| {name} | {mine:.3f} | {other:.3f} | {mine / other:.3f} |", flush=True)
    limits = (LIMIT, MEAN_LIMIT) if settings.steps == 1 else (ITERATIVE_LIMIT, ITERATIVE_LIMIT)
    print(
        f"worst ratio {max(ratios):.3f} (limit {limits[0]}), geometric mean {statistics.geometric_mean(ratios):.3f} "
        f"(limit {limits[1]})"
    )


if __name__ == "__main__":
    main()
