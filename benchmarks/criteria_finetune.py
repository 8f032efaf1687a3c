"""Prune trained networks to half the FLOPs by every criterion and fine-tune them alike: what accuracy is left?

Each network is trained once per seed; then, from that same network, every criterion prunes once, and the rest is
trained on with the same data order, steps and learning rate (which falls to 0 along a line). Accuracy is that on the
test images after the last step; nothing is chosen by it. Criteria that need data see the same images of the training
set. Two controls could embarrass them: random channels, and the same budget spent uniformly by the L1 norm. A network
that is trained on just as long without being pruned is the baseline.

Results are added to a file as they come, and a run that is started again goes on where it stopped::

    python benchmarks/criteria_finetune.py --root data/cifar10-jpeg [--weights resnet20.pt] [--seeds 3] [--table]
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune import criteria
from lightning_prune.allocation import plan_by_layer
from lightning_prune.datamodules import ImageFolderDataModule
from lightning_prune.models import build_network
from lightning_prune.models.weights import load_weights
from lightning_prune.plan import PruningPlan

# Network, its settings, steps and learning rate to train it, steps and learning rate to fine-tune it.
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, float], tuple[int, float]]] = {
    "vgg11_bn/4": ("vgg11_bn", {"width": 0.25}, (1400, 0.05), (176, 0.01)),
    "resnet20": ("resnet20", {}, (176, 0.01), (120, 0.01)),
}
KEEP = 0.5
Batches = list[tuple[Tensor, Tensor]]
Graph = lp.graph.ChannelGraph
Planned = Callable[[Graph, Batches], PruningPlan]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_score(criterion: Any, graph: Graph, batches: Batches) -> PruningPlan:
    return lp.plan(graph, criteria.score(graph, criterion, batches, loss_of), KEEP, round_to=1)


def by_layer(importance: Callable[..., dict[str, float]], graph: Graph, batches: Batches) -> PruningPlan:
    return plan_by_layer(graph, importance(graph, batches), criteria.l1(graph), KEEP, round_to=1)


ROWS: dict[str, Planned] = {
    "random channels": partial(by_score, "random"),
    "uniform, L1": partial(by_layer, lambda graph, batches: dict.fromkeys(graph.groups, 1.0)),
    "AFIE, L1": partial(by_layer, lambda graph, batches: criteria.afie(graph)),
    "AFIE's control (shapes alone), L1": partial(by_layer, lambda graph, batches: criteria.afie_of_shapes(graph)),
    "sensitiveness, L1": partial(
        by_layer, lambda graph, batches: criteria.layer_importance(criteria.sensitiveness(graph, batches[:2], draws=2))
    ),
    "L1": partial(by_score, "l1"),
    "L2": partial(by_score, "l2"),
    "BatchNorm scale": partial(by_score, "batch_norm_scale"),
    "FPGM": partial(by_score, "fpgm"),
    "LAMP": partial(by_score, "lamp"),
    "mean activation": partial(by_score, "mean_activation"),
    "APoZ": partial(by_score, "apoz"),
    "Taylor A": partial(by_score, {"name": "taylor", "variant": "a"}),
    "Taylor A, FLOPs term 0.1": partial(by_score, {"name": "taylor", "variant": "a", "flops_penalty": 0.1}),
    "Taylor A, FLOPs term 1": partial(by_score, {"name": "taylor", "variant": "a", "flops_penalty": 1.0}),
    "Taylor B": partial(by_score, {"name": "taylor", "variant": "b"}),
    "Taylor C": partial(by_score, {"name": "taylor", "variant": "c"}),
    "Taylor gate (2019)": partial(by_score, {"name": "taylor", "variant": "gate"}),
    "Taylor weights, sum then square (2019)": partial(by_score, {"name": "taylor", "variant": "sum_then_square"}),
    "Taylor weights, square then sum (2019)": partial(by_score, {"name": "taylor", "variant": "square_then_sum"}),
    "oracle, absolute": partial(by_score, "oracle"),
}


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
        weights = self.settings.weights if self.name == "resnet20" else None
        file = Path(self.settings.work) / f"{self.name.replace('/', '-')}-{self.seed}.pt"
        L.seed_everything(self.seed, verbose=False)
        model = build_network(kind, **arguments)
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        if weights:
            load_weights(model, weights)
        self.train(model, steps, lr)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        return model

    def train(self, model: nn.Module, steps: int, lr: float, first_epoch: int = 0) -> None:
        """Train for some steps; the epoch decides on the order of the images."""
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        model.train()
        done, epoch = 0, first_epoch
        while done < steps:
            loader = self.data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                if done == steps:
                    break
                loss = loss_of(model, self.data.on_after_batch_transfer(batch))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                done += 1
            epoch += 1

    @torch.no_grad()
    def accuracy(self, model: nn.Module, every: int = 1) -> float:
        """Return the share of test images, all or or a part of them, that are classified right."""
        model.eval()
        parts = torch.arange(0, len(self.data.test_set), every).split(500)
        batches = (self.data.on_after_batch_transfer(self.data.test_set.__getitems__(part.tolist())) for part in parts)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
        return right / sum(map(len, parts))

    def batches(self) -> Batches:
        """Return some training images as evaluation sees them, the same for all rows of a seed."""
        part = self.data.train_set
        indices = torch.randperm(len(part), generator=torch.Generator().manual_seed(self.seed))
        parts = indices[: self.settings.images].split(128)
        return [self.data.on_after_batch_transfer(part.__getitems__(chosen.tolist())) for chosen in parts]

    def row(self, planned: Planned | None, start: nn.Module) -> dict[str, Any]:
        """Prune a copy of the network by one row of the table, if it is to be pruned, and train it on."""
        model, began = copy.deepcopy(start), time.perf_counter()
        result: dict[str, Any] = {"flops": 1.0}
        if planned is not None:
            graph = lp.trace(model.eval(), torch.zeros(1, 3, 32, 32))
            plan = planned(graph, self.batches())
            lp.prune(model, plan)
            result = {"flops": plan.budget["achieved"], "widths": plan.widths, "pruned": self.accuracy(model, every=5)}
        result["planned_s"] = time.perf_counter() - began
        _, _, _, (steps, lr) = NETWORKS[self.name]
        self.train(model, steps, lr, first_epoch=1000)
        return {**result, "accuracy": self.accuracy(model), "total_s": time.perf_counter() - began}


def run(settings: argparse.Namespace, results: dict[str, Any]) -> None:
    rows: dict[str, Planned | None] = {"not pruned": None, **ROWS}
    for seed in range(settings.seeds):
        for name in settings.networks:
            keys = {f"{name} | {row} | {seed}": planned for row, planned in rows.items()}
            if all(key in results for key in keys):
                continue
            runner = Runner(name, seed, settings)
            start = runner.network()
            for key, planned in keys.items():
                if key not in results:
                    results[key] = runner.row(planned, start)
                    save(settings.results, results)
                    print(f"{key}: {results[key]['accuracy']:.4f} in {results[key]['total_s']:.0f} s", flush=True)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{100 * statistics.mean(values):.2f}" + (
        f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    )


def table(results: dict[str, Any]) -> str:
    lines = []
    for name in NETWORKS:
        found: dict[str, list[dict[str, Any]]] = {}
        for key, result in results.items():
            network, row, _ = key.split(" | ")
            if network == name:
                found.setdefault(row, []).append(result)
        if not found:
            continue
        ranked = sorted(found, key=lambda row: -statistics.mean(r["accuracy"] for r in found[row]))
        lines += [
            f"\n{name}, CIFAR-10 (JPEG copy):\n",
            "| criterion | seeds | FLOPs kept | test accuracy when pruned (%) | fine-tuned, last step (%) |",
            "|---|---|---|---|---|",
        ]
        for row in ranked:
            all_of = found[row]
            flops = statistics.mean(result["flops"] for result in all_of)
            pruned = spread([result["pruned"] for result in all_of if "pruned" in result])
            tuned = spread([result["accuracy"] for result in all_of])
            lines.append(f"| {row} | {len(all_of)} | {flops:.3f} | {pruned} | {tuned} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/cifar10-jpeg", help="folder with train/ and test/, a folder per class")
    parser.add_argument("--weights", help="published ResNet-20 to start from")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="training images that criteria may look at")
    parser.add_argument("--work", default="logs/criteria_finetune", help="where trained networks are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "criteria_finetune.json")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    settings = parser.parse_args()
    results = json.loads(settings.results.read_text()) if settings.results.exists() else {}
    if not settings.table:
        run(settings, results)
    print(table(results))


if __name__ == "__main__":
    main()
