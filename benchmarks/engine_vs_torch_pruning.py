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

import torch
import torch_pruning
import torchvision
from torch import nn

import lightning_prune as lp

NETWORKS = [
    "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "alexnet", "densenet121", "inception_v3", "efficientnet_v2_s",
    "convnext_tiny", "regnet_y_16gf", "vit_b_16", "shufflenet_v2_x1_0", "swin_t", "res2net50_26w_4s",
]  # fmt: skip
PARTS = ("trace", "score", "plan", "prune")
LIMIT, MEAN_LIMIT, ITERATIVE_LIMIT = 0.8, 0.2, 0.1


class Clock:
    """Seconds of each part of what is timed."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.last = time.perf_counter()

    def note(self, part: str) -> None:
        """Count the time since the last note for a part."""
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now


def ours(model: nn.Module, x: torch.Tensor, steps: int) -> dict[str, float]:
    clock = Clock()
    graph = lp.trace(model, x)
    clock.note("trace")
    for step in range(1, steps + 1):
        scores = lp.criteria.magnitude(graph)
        clock.note("score")
        plan = lp.plan(graph, scores, 1 - 0.5 * step / steps, "channels", round_to=1)
        clock.note("plan")
        lp.prune(model, plan)
        clock.note("prune")
    return clock.spent


def theirs(model: nn.Module, x: torch.Tensor, steps: int) -> dict[str, float]:
    start = time.perf_counter()
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
    return {"all": time.perf_counter() - start}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    size = 299 if name == "inception_v3" else 224
    if name.startswith("res2net"):
        import timm

        model = timm.create_model(name)
    else:
        settings = {"init_weights": False} if size == 299 else {}
        model = torchvision.models.get_model(name, weights=None, **settings)
    return model.eval(), torch.randn(1, 3, size, size)


def compare(name: str, rounds: int, steps: int) -> tuple[dict[str, float], float, str]:
    """Return the seconds of each part, those of Torch-Pruning, and what it raises, if it does: medians of rounds."""
    torch.manual_seed(0)
    model, x = built(name)
    mine, others = [], []
    failure = ""
    for _ in range(rounds):
        mine.append(ours(copy.deepcopy(model), x, steps))
        try:
            others.append(theirs(copy.deepcopy(model), x, steps)["all"])
        except Exception as raised:
            failure = repr(raised)
            break
    spent = {part: statistics.median(one[part] for one in mine) for part in PARTS}
    return spent, statistics.median(others or [float("nan")]), failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="prune in this many steps with one graph")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    head = ["network", "lightning-prune (s)", *PARTS, f"torch-pruning {torch_pruning.__version__} (s)", "ratio"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    ratios = []
    for name in settings.networks:
        spent, other, failure = compare(name, settings.rounds, settings.steps)
        mine = sum(spent.values())
        parts = " | ".join(f"{spent[part]:.3f}" for part in PARTS)
        if failure:
            print(f"| {name} | {mine:.3f} | {parts} | fails: {failure} | - |", flush=True)
            continue
        ratios.append(mine / other)
        print(f"| {name} | {mine:.3f} | {parts} | {other:.3f} | {mine / other:.3f} |", flush=True)
    limits = (LIMIT, MEAN_LIMIT) if settings.steps == 1 else (ITERATIVE_LIMIT, ITERATIVE_LIMIT)
    print(
        f"worst ratio {max(ratios):.3f} (limit {limits[0]}), geometric mean {statistics.geometric_mean(ratios):.3f} "
        f"(limit {limits[1]})"
    )


if __name__ == "__main__":
    main()
